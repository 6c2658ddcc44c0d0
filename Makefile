# banger: see `make help`. Everything that is set up is skipped when it is there already, and may be
# interrupted at any point.

PYTHON ?= $(shell tools/find-python)
BANGER := .venv/bin/banger
SETUP := $(PYTHON) -m tools.setup
PREFIX ?= /usr/local

.DEFAULT_GOAL := help
.PHONY: help demo setup test lint unit host boot smoke smoke-list smoke-one smoke-fresh smoke-clean \
    bench bench-host soak agent firecracker rootfs alpine-kernel rootfs-alpine alpine-register \
    void-kernel rootfs-void void-register build install uninstall clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  %-15s %s\n", $$1, $$2}'

# make itself ends with status 2 whenever the command of a recipe fails; that command's own status
# stands in make's last line ("Error 1").
demo: ## set up what a user needs, then run this repository's example in a microVM
	@$(SETUP) demo
	@$(BANGER) vm run --rm . -- make -C examples/hello test

setup: ## only the set-up of demo
	@$(SETUP) demo

test: ## everything but the smoke test: lint, types, import rules, unit, host and boot tests
	@$(SETUP) test
	@$(PYTHON) -m tools.check

lint: ## ruff, mypy, import-linter, go vet, gofmt, shellcheck
	@$(SETUP) lint
	@$(PYTHON) -m tools.check lint

unit: ## unit, property and contract tests
	@$(SETUP) lint
	@$(PYTHON) -m tools.check unit

host: ## tests that make links, namespaces and cgroups (root)
	@$(SETUP) test
	@$(PYTHON) -m tools.check host

boot: ## tests that boot microVMs
	@$(SETUP) test
	@$(PYTHON) -m tools.check boot

smoke: ## the scenarios under the real firecracker, in emulated hosts; JOBS=N of them side by side
	@$(SETUP) smoke
	@.venv/bin/python -m tests.smoke.run $(if $(JOBS),--jobs $(JOBS))

smoke-list: ## names, classes and descriptions of the scenarios
	@$(PYTHON) -m tests.smoke.run --list

smoke-one: ## SCENARIO=a[,b]: some of the scenarios
	@test -n "$(SCENARIO)" || { echo "usage: make smoke-one SCENARIO=a[,b]   (make smoke-list)" >&2; exit 2; }
	@$(SETUP) smoke
	@.venv/bin/python -m tests.smoke.run $(if $(JOBS),--jobs $(JOBS)) --scenario "$(SCENARIO)"

smoke-fresh: smoke-clean smoke ## as smoke, with the emulated host's image built anew

smoke-clean: ## forget the emulated host and its logs
	@$(PYTHON) -m tests.smoke.run --clean

bench: ## measure, against a bare VMM and ssh; results in bench/results
	@$(SETUP) test
	@.venv/bin/python tests/bench/run.py

bench-host: ## the installed host side, measured in an emulated host; results in bench/results
	@$(SETUP) smoke
	@.venv/bin/python -m tests.smoke.run --jobs 1 --scenario figures_vms,figures_pool,figures_dns

soak: ## property tests with new examples, then VMs made and deleted for SOAK_MINUTES=60; plots in docs/
	@$(SETUP) soak
	@.venv/bin/python -m tests.soak.run --minutes $(or $(SOAK_MINUTES),60)

agent: ## build the guest agent for amd64 and arm64
	@$(SETUP) host venv go agent

firecracker: ## fetch the pinned, hash-checked firecracker and jailer
	@$(SETUP) host venv firecracker

# What is built lies in build/manual/. ARGS are further words of `banger image build`.
DISTROS := .venv/bin/python -m tools.distros

rootfs: ## RECIPE=debian-bookworm: its root filesystem in build/manual, without storing an image
	@$(SETUP) host venv go agent firecracker
	@$(DISTROS) rootfs "$(or $(RECIPE),debian-bookworm)" "$(ARGS)"

alpine-kernel: ## Alpine's kernel as alpine-virt; KERNEL=FILE.apk or its directory, ALPINE_RELEASE=3.x
	@$(SETUP) host venv go agent firecracker
	@KERNEL="$(KERNEL)" ALPINE_RELEASE="$(ALPINE_RELEASE)" $(DISTROS) kernel alpine

rootfs-alpine: ## Alpine's root filesystem; ARGS="--archive FILE" where no registry is reached
	@$(SETUP) host venv go agent firecracker
	@ALPINE_RELEASE="$(ALPINE_RELEASE)" $(DISTROS) rootfs alpine "$(ARGS)"

alpine-register: ## the image alpine of it, with alpine-virt if it is here
	@$(SETUP) host venv go agent firecracker
	@$(DISTROS) register alpine

void-kernel: ## Void's kernel as void-linux; KERNEL=FILE.xbps or its directory
	@$(SETUP) host venv go agent firecracker
	@KERNEL="$(KERNEL)" $(DISTROS) kernel void

rootfs-void: ## Void's root filesystem; ARGS="--archive ROOTFS-TARBALL"
	@$(SETUP) host venv go agent firecracker
	@$(DISTROS) rootfs void "$(ARGS)"

void-register: ## the image void of it, with void-linux if it is here
	@$(SETUP) host venv go agent firecracker
	@$(DISTROS) register void

build: ## the wheel in dist/, and build/bin/{banger,bangerd,banger-root,banger-vsock-agent}
	@$(SETUP) lint
	@.venv/bin/python -m tools.package

install: build ## under PREFIX (default /usr/local)
	@$(PYTHON) -m tools.install install "$(PREFIX)"

uninstall: ## remove what install put under PREFIX; user data stays
	@$(PYTHON) -m tools.install uninstall "$(PREFIX)"

clean: ## remove build/, dist/ and caches of the tools; .venv and the shared cache stay
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
