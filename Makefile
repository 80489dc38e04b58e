# The two commands: `make demo` runs the main job, `make test` passes the tests.
# Both install what is missing and say so.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

export CGO_ENABLED := 0
export GOFLAGS := -trimpath -buildvcs=false
GO := $(shell scripts/go 2>/dev/null || echo go)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -E env "PATH=$(PATH)")
FUZZTIME ?= 60s
FUZZ ?= .

# Root runs the quick tests as a user without rights, in a user namespace.
UNPRIVILEGED := $(if $(filter 0,$(shell id -u)),unshare --user --map-user=1000 --map-group=1000)

.PHONY: help build setup demo test check race programs devservers lint vuln arm64 size fuzz bench gen release test-deb test-vm clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

build: ## build bin/cordon with the agent inside, and bin/cordon-lab
	@scripts/go >/dev/null
	@mkdir -p bin cmd/cordon/embedded cmd/cordon-lab/embedded
	$(GO) build -ldflags='-s -w' -o cmd/cordon/embedded/cordon-agent ./cmd/cordon-agent
	$(GO) build -ldflags='-s -w' -o cmd/cordon-lab/embedded/cordon-probe ./proving/conformance/probe/cordon-probe
	$(GO) build -ldflags="-s -w -X github.com/cordonhq/cordon/internal/cli.built=$$(scripts/version)" -o bin/cordon ./cmd/cordon
	$(GO) build -ldflags='-s -w' -o bin/cordon-lab ./cmd/cordon-lab

setup: ## install what demo and test need and the machine lacks
	@scripts/setup

demo: setup build ## run the main job: a server, a small internet, the documentation's scenarios
	$(SUDO) bin/cordon-lab demo

test: setup build ## all tests: unit, kernel, gVisor, SDKs; needs root
	$(SUDO) scripts/test

check: ## what must hold before every commit: format, vet, quick tests; no root, changes no file
	@scripts/go >/dev/null
	@bad=$$(find . \( -name '.?*' -o -name node_modules \) -prune -o -name '*.go' -print0 | xargs -0 "$$($(GO) env GOROOT)/bin/gofmt" -l); \
		test -z "$$bad" || { printf 'not formatted by gofmt:\n%s\n' "$$bad"; exit 1; }
	$(GO) vet ./...
	env -u REQUIRE_PRIVILEGED $(UNPRIVILEGED) $(GO) test -short ./...

race: setup ## the race detector over all that runs without gVisor; needs root and gcc
	$(SUDO) scripts/test race

programs: build ## real package managers and HTTP clients: presets, denials, names; root, a quarter of an hour
	$(SUDO) env TEST_PROGRAMS=1 REQUIRE_PRIVILEGED=1 $(GO) test -count=1 -timeout 40m -v ./test/programs

devservers: build ## development servers at their public URLs in Chromium; root, half an hour
	$(SUDO) env DEVSERVERS=1 REQUIRE_PRIVILEGED=1 $(GO) test -count=1 -timeout 60m -v ./test/devservers

lint: ## golangci-lint, pinned in tools/go.mod
	$(GO) tool -modfile=tools/go.mod golangci-lint run ./...

vuln: ## known vulnerabilities of what is linked, by govulncheck; VULNDB names another database
	@scripts/vuln

arm64: ## all commands build for arm64
	GOARCH=arm64 $(GO) build ./...

size: ## lines, functions and methods of this tree
	@scripts/size

fuzz: ## every fuzz target, or those that match FUZZ, for FUZZTIME each
	@scripts/fuzz '$(FUZZTIME)' '$(FUZZ)'

bench: build ## Go benchmarks of the hot paths
	$(GO) test -run '^$$' -bench . -benchmem ./internal/policy ./internal/egress ./internal/ingress

gen: ## regenerate what is generated from api/
	@scripts/gen

release: setup ## packages for amd64 and arm64 in dist/: tar.gz, .deb, bill of materials, checksums
	@scripts/release

test-deb: setup build ## the Debian package, installed and purged in a clean root; after make release
	$(SUDO) scripts/test-deb

test-vm: setup build ## Debian 12 and 13 under qemu: systemd, cgroup v2, the unit itself; half an hour
	$(SUDO) scripts/test-vm

clean: ## remove what build made
	rm -rf bin dist cmd/*/embedded/cordon-*
