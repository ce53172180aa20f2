// uWebSockets in C++: its own pub/sub behind one WebSocket route.
//
// Source: the flags and the message of README.md in the folder above; the library's sources come from the crate that
// ../Cargo.toml names and are compiled with -O3 -flto for plain epoll, without TLS and compression.
// Tuned: no idle timer and no pings (their bookkeeping is work that a delivery does not need), a backpressure limit that a
// benchmark does not reach, an empty user object, the HMAC key schedule kept in one EVP_MAC context.
// Errors: a client over the backpressure limit misses messages, which the load tester counts as lost.

#include <App.h>

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>

#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <unistd.h>

namespace {

constexpr std::size_t message_bytes_min = 64;
constexpr std::size_t message_bytes_max = 1 << 20;
constexpr std::string_view topic = "all";
constexpr std::string_view welcome =
    R"({"type":"welcome","connection":"c_0000000000000000","auth":{"type":"jwt","sub":"u0000000","expires_at":1800000000000000},"heartbeat_ms":25000})";

struct Options {
    int port = 0;
    std::size_t message_bytes = 128;
    int interval_ms = 1000;
    std::optional<std::string> secret;
};

// Nothing is kept for a connection beyond what the library keeps.
struct PerConnection {};

std::int64_t unix_micros() {
    using namespace std::chrono;
    return duration_cast<microseconds>(system_clock::now().time_since_epoch()).count();
}

[[noreturn]] void refuse(const std::string &why) {
    std::fprintf(stderr, "uws: %s\n", why.c_str());
    std::exit(2);
}

template <typename Number>
Number number(std::string_view flag, std::string_view value) {
    Number parsed{};
    auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), parsed);
    if (error != std::errc{} || end != value.data() + value.size()) {
        refuse(std::string(flag) + " wants a number");
    }
    return parsed;
}

Options read_options(int argc, char **argv) {
    Options options;
    for (int place = 1; place < argc; place += 2) {
        std::string_view flag = argv[place];
        if (place + 1 == argc) {
            refuse(std::string(flag) + " wants a value");
        }
        std::string_view value = argv[place + 1];
        if (flag == "--port") {
            options.port = number<std::uint16_t>(flag, value);
        } else if (flag == "--bytes") {
            options.message_bytes = number<std::size_t>(flag, value);
        } else if (flag == "--interval") {
            options.interval_ms = number<int>(flag, value);
        } else if (flag == "--secret") {
            std::ifstream file{std::string(value), std::ios::binary};
            if (!file) {
                refuse("the secret file cannot be read");
            }
            options.secret.emplace(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
            if (!options.secret->empty() && options.secret->back() == '\n') {
                options.secret->pop_back();
            }
        } else {
            refuse("unknown flag " + std::string(flag));
        }
    }
    if (options.message_bytes < message_bytes_min || options.message_bytes > message_bytes_max) {
        refuse("--bytes is out of range");
    }
    if (options.interval_ms < 0) {
        refuse("--interval is out of range");
    }
    // The value that greets would not be the newest.
    if (options.secret && options.interval_ms > 0) {
        refuse("--secret greets and does not broadcast: it goes with --interval 0");
    }
    return options;
}

class Message {
public:
    explicit Message(std::size_t bytes) : bytes(bytes) {}

    std::string next() {
        std::string text = "{\"ts\":" + std::to_string(unix_micros()) + ",\"seq\":" + std::to_string(++seq) + ",\"pad\":\"";
        if (text.size() + 2 < bytes) {
            text.append(bytes - text.size() - 2, 'x');
        }
        return text += "\"}";
    }

private:
    std::size_t bytes;
    std::uint64_t seq = 0;
};

// Base64url without padding: -1 where the text is none.
int decode(std::string_view text, unsigned char *out, std::size_t room) {
    static const auto table = [] {
        std::array<signed char, 256> table;
        table.fill(-1);
        const char *digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        for (int value = 0; value < 64; value++) {
            table[static_cast<unsigned char>(digits[value])] = static_cast<signed char>(value);
        }
        return table;
    }();
    if (text.size() % 4 == 1 || text.size() / 4 * 3 + 3 > room) {
        return -1;
    }
    std::uint32_t held = 0;
    int bits = 0, length = 0;
    for (unsigned char letter : text) {
        if (table[letter] < 0) {
            return -1;
        }
        held = held << 6 | static_cast<std::uint32_t>(table[letter]);
        if ((bits += 6) >= 8) {
            bits -= 8;
            out[length++] = static_cast<unsigned char>(held >> bits);
        }
    }
    return length;
}

// Checks an HS256 token: its algorithm, its signature, and `exp` with the leeway that restcast gives.
class Verifier {
public:
    explicit Verifier(const std::string &secret) {
        EVP_MAC *mac = EVP_MAC_fetch(nullptr, "HMAC", nullptr);
        context = EVP_MAC_CTX_new(mac);
        EVP_MAC_free(mac);
        char digest[] = "SHA256";
        OSSL_PARAM parameters[] = {OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0), OSSL_PARAM_construct_end()};
        if (!EVP_MAC_init(context, reinterpret_cast<const unsigned char *>(secret.data()), secret.size(), parameters)) {
            refuse("the secret is no HMAC key");
        }
    }
    Verifier(const Verifier &) = delete;
    Verifier &operator=(const Verifier &) = delete;
    ~Verifier() { EVP_MAC_CTX_free(context); }

    bool accepts(std::string_view authorization) {
        constexpr std::string_view scheme = "Bearer ";
        if (!authorization.starts_with(scheme)) {
            return false;
        }
        std::string_view token = authorization.substr(scheme.size());
        std::size_t first = token.find('.'), last = token.rfind('.');
        if (first == std::string_view::npos || first == last) {
            return false;
        }
        std::string_view signed_part = token.substr(0, last);
        unsigned char given[64], made[EVP_MAX_MD_SIZE];
        std::size_t length = 0;
        // Without a key, init starts over with the one that stands.
        if (decode(token.substr(last + 1), given, sizeof given) != 32 || !EVP_MAC_init(context, nullptr, 0, nullptr) ||
            !EVP_MAC_update(context, reinterpret_cast<const unsigned char *>(signed_part.data()), signed_part.size()) ||
            !EVP_MAC_final(context, made, &length, sizeof made) || length != 32 || CRYPTO_memcmp(given, made, 32) != 0) {
            return false;
        }
        unsigned char json[4096];
        int bytes = decode(token.substr(0, first), json, sizeof json);
        if (bytes < 0 || std::string_view(reinterpret_cast<char *>(json), bytes).find("\"HS256\"") == std::string_view::npos) {
            return false;
        }
        bytes = decode(token.substr(first + 1, last - first - 1), json, sizeof json);
        return bytes >= 0 && lives(std::string_view(reinterpret_cast<char *>(json), bytes));
    }

private:
    EVP_MAC_CTX *context;

    static bool lives(std::string_view claims) {
        constexpr std::string_view name = "\"exp\":";
        constexpr std::int64_t leeway_s = 5;
        std::size_t place = claims.find(name);
        if (place == std::string_view::npos) {
            return false;
        }
        place = claims.find_first_not_of(' ', place + name.size());
        if (place == std::string_view::npos) {
            return false;
        }
        std::int64_t exp = 0;
        auto [end, error] = std::from_chars(claims.data() + place, claims.data() + claims.size(), exp);
        return error == std::errc{} && unix_micros() / 1'000'000 < exp + leeway_s;
    }
};

struct Server {
    uWS::App *app;
    Message message;
};

} // namespace

int main(int argc, char **argv) {
    Options options = read_options(argc, argv);
    std::optional<Verifier> verifier;
    std::string value;
    if (options.secret) {
        verifier.emplace(*options.secret);
        value = Message(options.message_bytes).next();
    }
    uWS::App app;
    app.ws<PerConnection>("/ws", {
        .compression = uWS::DISABLED,
        .maxPayloadLength = 16 * 1024,
        .idleTimeout = 0,
        .maxBackpressure = 1024 * 1024,
        .closeOnBackpressureLimit = false,
        .resetIdleTimeoutOnSend = false,
        .sendPingsAutomatically = false,
        .upgrade = [&verifier](auto *response, auto *request, auto *context) {
            if (verifier && !verifier->accepts(request->getHeader("authorization"))) {
                response->writeStatus("401 Unauthorized")->end();
                return;
            }
            response->template upgrade<PerConnection>({}, request->getHeader("sec-websocket-key"),
                                                      request->getHeader("sec-websocket-protocol"),
                                                      request->getHeader("sec-websocket-extensions"), context);
        },
        .open = [&verifier, &value](auto *connection) {
            connection->subscribe(topic);
            // The library corks here: the answer to the upgrade and both messages leave in one send.
            if (verifier) {
                connection->send(welcome, uWS::OpCode::TEXT);
                connection->send(value, uWS::OpCode::TEXT);
            }
        },
    });
    app.listen("127.0.0.1", options.port, [](us_listen_socket_t *socket) {
        if (!socket) {
            refuse("the port is taken");
        }
        int port = us_socket_local_port(0, reinterpret_cast<us_socket_t *>(socket));
        std::printf("{\"ready\":true,\"listen\":\"127.0.0.1:%d\",\"pid\":%d}\n", port, static_cast<int>(getpid()));
        std::fflush(stdout);
    });
    Server server{&app, Message(options.message_bytes)};
    if (options.interval_ms > 0) {
        auto *timer = us_create_timer(reinterpret_cast<us_loop_t *>(uWS::Loop::get()), 0, sizeof(Server *));
        Server *shared = &server;
        std::memcpy(us_timer_ext(timer), &shared, sizeof shared);
        // A timerfd: ticks that a late loop missed arrive as one.
        us_timer_set(timer, [](us_timer_t *timer) {
            Server *server;
            std::memcpy(&server, us_timer_ext(timer), sizeof server);
            server->app->publish(topic, server->message.next(), uWS::OpCode::TEXT);
        }, options.interval_ms, options.interval_ms);
    }
    app.run();
}
