# The one door: what is checked, cheapest first. `.ci/run` calls the same recipes.

.PHONY: all setup fmt-check lint core doc build fuzz-smoke test autobahn instructions bench-once demo loadtest

all: fmt-check lint core doc test

# Installs what the recipes need beyond cargo; skips what is there.
setup:
	.ci/setup

fmt-check:
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo fmt --manifest-path benches/peers/Cargo.toml --check

# With and without the shell around the core.
lint:
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --lib --no-default-features -- -D warnings

# The core builds and holds without sockets, threads and clocks.
core:
	cargo test --no-default-features --lib

doc:
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# All that `make test` and `make bench-once` run, built at once: one choice of features, so that nothing is built twice.
build:
	cargo test --workspace --tests --benches --no-run

# Half a minute of each fuzz target, from its committed corpus. Needs a nightly toolchain.
fuzz-smoke: setup
	.ci/fuzz 30

# Everything: unit, property, integration, browser and simulator tests. Most of them mostly wait: RUST_TEST_THREADS=4 makes
# it quicker on few processors. A test that hangs ends its own file after a while, by name, and not the whole run.
TEST_LIMIT := --config 'target."cfg(all())".runner = ["timeout", "--kill-after=10", "1200"]'
test: setup
	RESTCAST_BUILT="$(abspath $(or $(CARGO_TARGET_DIR),target))/debug/restcast" \
		cargo test $(TEST_LIMIT) --workspace --no-fail-fast

# The Autobahn test suite against `/echo`. `AUTOBAHN=--quick` leaves out the slow cases, as .ci/run does.
autobahn: setup
	tests/autobahn/run $(AUTOBAHN)

# Instructions of the hot paths against benches/instructions/figures.toml; UPDATE_INSTRUCTIONS=1 writes it anew.
instructions: setup
	cargo run --release --quiet -p instructions

# Each bench once and unmeasured, to see that it runs.
bench-once:
	cargo test --quiet --workspace --bench '*'

# A sample upstream, two streams of it and the playground: http://127.0.0.1:8080/
demo:
	cargo run --release -- demo

# The load tester, built to be fast: target/release/loadtest. loadtest/README.md says how to use it.
loadtest:
	cargo build --release -p restcast-loadtest
