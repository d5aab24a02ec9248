# Offshoot's chores. `make demo` and `make test` need nothing but Debian 12 or 13, Rust and root.

TARGET  := x86_64-unknown-linux-gnu
PROFILE ?= release
BIN     := target/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
AGENT   := target/$(TARGET)/agent/offshoot-agent

.PHONY: help build agent demo check test e2e bench bench-create soak verify install-deps install install-files clean

help: ## Show this
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install-deps: ## Install what building, running and testing need from Debian (root)
	@scripts/install-deps

agent: ## Build the guest agent (static)
	RUSTFLAGS='-C target-feature=+crt-static' cargo build --locked --profile agent -p offshoot-agent --target $(TARGET)

build: agent ## Build offshootd, offshoot and the agent
	cargo build --locked --profile $(PROFILE) --workspace --bin offshootd --bin offshoot
	@ln -sf ../$(TARGET)/agent/offshoot-agent $(BIN)/offshoot-agent

demo: install-deps build ## Run the main job from nothing: an image, four VMs, timings, disk
	@BIN=$(BIN) scripts/demo

check: ## Format, lints, tidy, docs, unit and component tests
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo run --locked -q -p xtask -- tidy
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items -q
	scripts/test units

test: install-deps ## Everything, with real VMs (root)
	$(MAKE) build PROFILE=dev
	scripts/test all

e2e: ## Only the tests with real VMs (root; after make test)
	scripts/test e2e

soak: ## The tests of crashes and races, again and again with other random points (root; after make test; ROUNDS=10)
	scripts/test soak

bench: install-deps build ## Print the benchmarks, all or ONLY=shared; ONLY=kernel KERNEL=ID (root)
	@BIN=$(BIN) ONLY="$(ONLY)" KERNEL="$(KERNEL)" scripts/bench

bench-create: install-deps build ## Measure from the request for a VM to its first answers (root; ARGS="--runs N --image I --boot … --ssh")
	@BIN=$(BIN) scripts/bench-create $(ARGS)

verify: install-deps ## Run whole lives of VMs, and fail on anything that is not as it was before (root)
	$(MAKE) build PROFILE=dev
	scripts/test verify

install: build install-files ## Install to /usr/local, with a systemd unit (DESTDIR=)

# What was built already.
install-files:
	install -D -m 0755 $(BIN)/offshoot $(BIN)/offshootd -t $(DESTDIR)/usr/local/bin
	install -D -m 0755 $(AGENT) $(DESTDIR)/usr/local/bin/offshoot-agent
	install -D -m 0644 packaging/offshootd.service -t $(DESTDIR)/usr/local/lib/systemd/system
	install -D -m 0644 docs/config.md -t $(DESTDIR)/usr/local/share/doc/offshoot

clean: ## Delete what was built
	cargo clean
