# `make help` lists the targets. `.ci/run` runs `make test` and `make check`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test test-qdrant check fmt lint-proto breaking proto-landed audit tools docs-update bench-retrieval bench-search bench-memory lab-up lab-status lab-down lab-drill lab-programs clean

CACHE := $(or $(AETERNA_CACHE),$(HOME)/.cache/aeterna)
BUILD := $(or $(CARGO_TARGET_DIR),target)/release
# `make run ARGS="--data-dir DIR"` has its models there, too.
DATA_DIR = $(shell echo '$(ARGS)' | grep -oE -- '--(data-dir|server\.data_dir)[= ][^ ]+' || true)
export PATH := $(shell scripts/tools.sh --path):$(PATH)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## build and start every service in one process (ARGS="--listen 127.0.0.1:7800")
	cargo build --release --locked -p aeterna
	@$(BUILD)/aeterna models fetch $(DATA_DIR) || echo "make run: going on without it: the \`hash\` model compares words only" >&2
	@exec $(BUILD)/aeterna serve $(ARGS)

test-qdrant: ## run the suite of the vector index on Qdrant (QDRANT_URL=qdrant://host:6334, or QDRANT_BIN=PATH to start three nodes)
	@test -n "$(QDRANT_URL)$(QDRANT)" || { echo "set QDRANT_URL or QDRANT_BIN" >&2; exit 1; }
	QDRANT_BIN="$(QDRANT)" cargo test --locked -p aeterna-memory --lib qdrant
	QDRANT_BIN="$(QDRANT)" cargo test --locked -p aeterna-it qdrant

test: ## run every test (ARGS="--no-fail-fast" goes to cargo test)
	@scripts/tools.sh grpcurl pip lab envoy
	cargo test --workspace --locked $(ARGS)

check: lint-proto breaking ## check format, lints, contracts, licences, docs and scripts: what CI asks beside the tests
	@scripts/tools.sh cargo-deny
	for script in scripts/*.sh .ci/run; do bash -n "$$script"; done
	cargo fmt --all --check
	cargo deny --locked check --allow unmatched-wrapper --allow unused-wrapper licenses bans sources
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

fmt: ## format the Rust sources and the interface definitions
	@scripts/tools.sh buf
	cargo fmt --all
	buf format -w

lint-proto: ## lint the interface definitions and check their format
	@scripts/tools.sh buf
	buf lint
	buf format --diff --exit-code

breaking: ## refuse a change to the contracts that would break a client
	@scripts/tools.sh buf
	scripts/breaking.sh

proto-landed: lint-proto ## record today's contracts as landed, after checking them against the last record
	if [[ -f proto/landed.binpb ]]; then scripts/breaking.sh; fi
	buf build --path proto/aeterna --exclude-source-info -o proto/landed.binpb

# cargo-deny fetches the database with git, so git can be told to take it from a clone (ADVISORY_DB) instead.
ADVISORY_URL := https://github.com/rustsec/advisory-db
audit: ## check the dependencies for known vulnerabilities (ADVISORY_DB=a local clone of the advisory database)
	@scripts/tools.sh cargo-deny
	@if [[ -n "$(ADVISORY_DB)" ]]; then \
	  db=$$(realpath -e "$(ADVISORY_DB)"); \
	  export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0="url.file://$$db.insteadOf" GIT_CONFIG_VALUE_0=$(ADVISORY_URL); \
	fi; \
	cargo deny --locked check advisories


tools: ## install buf, grpcurl and cargo-deny (tests and the lab install the rest)
	scripts/tools.sh buf grpcurl cargo-deny

docs-update: ## rewrite the documentation pages that are generated from the code
	@scripts/tools.sh grpcurl
	UPDATE_DOCS=1 cargo test --workspace --locked --test it -- docs readme

bench-retrieval: ## evidence recall on LoCoMo-form conversations (DATA=<json>, MODEL_DIR=<dir> instead of all-MiniLM-L6-v2, RERANKER_DIR=<dir>)
	@[[ -n "$(DATA)" ]] || { echo "bench-retrieval: pass the conversations: DATA=<LoCoMo-form json>" >&2; exit 2; }
	cargo build --release --locked -p aeterna -p aeterna-bench
	@$(BUILD)/aeterna models fetch --data-dir "$(CACHE)" >&2
	@$(BUILD)/aeterna-bench retrieval --data "$(DATA)" --server $(BUILD)/aeterna \
	  --model-dir "$(or $(MODEL_DIR),$(CACHE)/models/all-MiniLM-L6-v2)" \
	  $(if $(RERANKER_DIR),--reranker-dir "$(RERANKER_DIR)")

bench-search: ## vector search beside exact scans and a public HNSW library (N=100000, GROWTH=1000000, SPECTRUM=mid|hard|untrained, DIMENSIONS=1536)
	cargo build --release --locked -p aeterna -p aeterna-bench --features aeterna-bench/hnsw
	@$(BUILD)/aeterna-bench search --n "$(or $(N),100000)" \
	  --growth "$(or $(GROWTH),1000000)" --spectrum "$(or $(SPECTRUM),mid)" --dimensions "$(or $(DIMENSIONS),1536)"

bench-memory: ## add and search end to end over gRPC (N=100000, CONCURRENCY=16)
	cargo build --release --locked -p aeterna -p aeterna-bench
	@$(BUILD)/aeterna-bench memory --n "$(or $(N),100000)" --concurrency "$(or $(CONCURRENCY),16)" --server $(BUILD)/aeterna

LAB = $(BUILD)/aeterna-lab --directory "$(or $(LAB_DIR),/tmp/aeterna-lab)"
QDRANT = $(or $(QDRANT_BIN),$(shell command -v qdrant))
LAB_UP = --timings "$(or $(TIMINGS),tuned)" --patroni "$(shell scripts/tools.sh --path)/../patroni" \
  --replicas "$(or $(REPLICAS),usual)" $(if $(QDRANT),--qdrant "$(QDRANT)")
lab-programs: ## build what the lab needs
	@scripts/tools.sh lab envoy
	cargo build --release --locked -p aeterna-lab -p aeterna-memory -p aeterna-embedding

lab-up: lab-programs ## start the highly-available stores and two copies of each service on this machine (TIMINGS=tuned|specified, LAB_DIR=/tmp/aeterna-lab; with QDRANT_BIN=PATH: REPLICAS=usual|strict|specified)
	@$(LAB) up $(LAB_UP)

lab-status: ## show who is who in the lab, lag and health
	@$(LAB) status

lab-down: ## kill everything in the lab and remove its directory
	@$(LAB) down

lab-drill: lab-programs ## break the lab under load and check that nothing was lost (DRILL=primary-killed|…|all, TABLE=FILE; without DRILL: list them)
	@$(LAB) drill $(LAB_UP) $(if $(TABLE),--table "$(TABLE)") $(DRILL)

clean: ## remove what was built (installed tools and data stay)
	cargo clean
