//! The upstream client gives back every descriptor. Alone in its process, so that they can be counted.

mod support;

use std::net::TcpListener;
use std::time::Duration;

use monoio::time::{sleep, timeout};
use restcast::runtime::fetch::FetcherOptions;
use restcast::runtime::resolver::Resolver;
use restcast::stream::CaFile;
use restcast::stream::poll::Target;
use support::client::{Client, SECOND, short, target};
use support::{Authority, Reply, Step, Upstream, on_each_driver};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("procfs").count()
}

#[test]
fn no_descriptor_leaks_whatever_happens() {
    on_each_driver(async || {
        everything().await; // Takes what is taken once and kept, if anything.
        let before = settled(usize::MAX).await;
        for _ in 0..4 {
            everything().await;
        }
        let after = settled(before).await;
        assert_eq!(after, before, "descriptors before and after");
    });
}

/// The count of descriptors once it is `expected`, or when it has had time enough: a close in the ring is not at once.
async fn settled(expected: usize) -> usize {
    for _ in 0..50 {
        if descriptors() == expected {
            break;
        }
        sleep(Duration::from_millis(10)).await;
    }
    descriptors()
}

/// Every way a fetch can end, with a client and servers that are gone afterwards.
async fn everything() {
    let client = Client::new();
    let (plain, authority) = (Upstream::start(), Authority::new());
    let sealed = Upstream::start_tls(&authority.identity(&["127.0.0.1"]));
    let wrong = Upstream::start_tls(&authority.identity(&["elsewhere.example"]));
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent_at = silent.local_addr().expect("an address");
    let ca = CaFile { path: "ca.pem".into(), pem: authority.pem().into_bytes().into() };
    let asked = |url: &str| {
        target(url, |options| {
            short(options);
            options.connect_timeout = SECOND / 10;
            options.ca = Some(ca.clone());
        })
    };
    for upstream in [&plain, &sealed] {
        for reply in [
            Reply::steps(vec![Step::Stall]),
            Reply::steps(vec![Step::Close]),
            Reply::steps(vec![Step::Reset]),
            Reply::json("1").drip(1, Duration::from_millis(30)),
            Reply::raw(*b"garbage\r\n\r\n"),
            Reply::promise(2 << 30),
            Reply::endless_chunks(),
            Reply::reset_within(1, 9),
        ] {
            upstream.set("/leads", reply);
            client.poll(asked(&upstream.url("/leads"))).await.expect_err("a fault");
        }
        // Dropped at any point.
        upstream.set("/leads", Reply::json("1").delay(Duration::from_millis(5)));
        for micros in [0, 20, 50, 100, 200, 500, 1000, 2000, 4000, 7000] {
            let _ = timeout(Duration::from_micros(micros), client.poll(asked(&upstream.url("/leads")))).await;
            let fresh = Client::new();
            let _ = timeout(Duration::from_micros(micros), fresh.poll(asked(&upstream.url("/leads")))).await;
        }
        upstream.set_json("/leads", "1");
        client.poll(asked(&upstream.url("/leads"))).await.expect("a response");
    }
    client.poll(asked(&wrong.url("/leads"))).await.expect_err("a wrong certificate");
    client.poll(asked(&format!("https://{silent_at}/"))).await.expect_err("no handshake");
    losers(target(&plain.url_by_name("many.test", "/leads"), |_| {})).await;
}

/// Attempts to connect that are beaten by another.
async fn losers(target: Target) {
    let port = target.url.port().expect("a port");
    let hanging = TcpListener::bind(("127.0.0.9", port)).expect("the port is free there");
    socket2::SockRef::from(&hanging).listen(0).expect("a shorter queue");
    let address = hanging.local_addr().expect("an address");
    let _fillers: Vec<_> =
        (0..3).map(|_| std::net::TcpStream::connect_timeout(&address, Duration::from_millis(20))).collect();
    let list = ["127.0.0.9", "127.0.0.8", "::1", "127.0.0.1"].map(|ip| ip.parse().expect("an address"));
    let client = Client::with(FetcherOptions::default(), Resolver::with_lookup(Box::new(move |_| Ok(list.to_vec()))));
    client.poll(target).await.expect("the last address answers");
}
