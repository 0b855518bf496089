# Every target installs what it needs and says so; a second run is quick.
.PHONY: help demo test test-kernel test-cluster test-e2e test-long lint bench bench-kernel bench-lives venv prepare clean

help:
	@echo "make demo   a volume goes into a guest, is measured and survives the guest (about 3 minutes)"
	@echo "make test   every test that fits into 15 minutes"
	@echo "make test-kernel  device-mapper, LVM, containerd and crashes, in a user-mode kernel if need be (20 minutes)"
	@echo "make test-cluster  a real Kubernetes: the chart, its volumes, nodes that fail (15 minutes; 15 more to build it)"
	@echo "make test-e2e  Kubernetes' own end-to-end tests of storage (an hour; 10 minutes more to build them)"
	@echo "make test-long  what is repeated and large: three suites, 10,000 snapshots, 200 kill rounds (an hour)"
	@echo "make lint   ruff, mypy, import-linter"
	@echo "make bench-kernel  the snapshotter against containerd's devmapper and overlayfs (10 minutes)"
	@echo "make bench-lives  a container's life beside devmapper's, a slow disk, a pool that waits, Usages (15 minutes)"
	@echo "make bench  publish latency, memory, create and stage times; figures go to bench-results/"

venv:
	@tests/prepare/debian.sh run
	@tests/prepare/python.sh

prepare: venv
	@tests/prepare/debian.sh test kernel watch
	@tests/prepare/nfs.sh
	@tests/prepare/go.sh
	@tests/prepare/containerds.sh

demo: venv
	@tests/prepare/debian.sh test
	@.venv/bin/python -m tests.demo $(ARGS)

# Two workers share the files of tests; each test has its machines, directories and addresses to itself.
test: prepare
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/cluster $(ARGS)

test-kernel: prepare
	@.venv/bin/python -m tests.kernel $(ARGS)

# A real Kubernetes: the first time its programs are built, a quarter of an hour.
# Of these only `make test-long` runs every one; a shorter one of the same is left in each of their files.
SHORT_CLUSTER = --deselect tests/cluster/test_taken_over.py::test_both_at_once_are_refused \
	--deselect "tests/cluster/test_edge.py::test_pods_come_back_after_a_reboot_while_the_cloud_is_away[by itself]" \
	--deselect "tests/cluster/test_sandbox.py::test_a_node_that_was_off_runs_its_guests_again[]" \
	--deselect tests/cluster/test_two_nodes.py::test_what_is_left_of_a_node_that_is_gone_is_taken_away_by_hand \
	--deselect tests/cluster/test_rights.py

test-cluster: prepare
	@tests/prepare/cluster.sh
	@tests/prepare/debian.sh image
	@RUNVOL_CLUSTER_TIER=1 .venv/bin/python -m pytest tests/cluster $(SHORT_CLUSTER) $(ARGS)

# Kubernetes' own tests against each driver file; ARGS are BACKENDs and more.
test-e2e: prepare
	@tests/prepare/cluster.sh
	@tests/prepare/debian.sh image
	@tests/prepare/e2e.sh
	@.venv/bin/python -m tests.e2e $(ARGS)

test-long: prepare
	@RUNVOL_SUITES=3 RUNVOL_MANY=10000 RUNVOL_LIVES=100 RUNVOL_ROUNDS=100 .venv/bin/python -m tests.kernel $(ARGS)
	@RUNVOL_POWER_CUTS=10 .venv/bin/python -m pytest tests/kernel/test_power_cut.py
	@RUNVOL_FUZZ=1000000 .venv/bin/python -m pytest tests/fuzz
	@RUNVOL_ATTACKS=100 .venv/bin/python -m pytest -s tests/attacks
	@.venv/bin/python -m tests.kill.load --rounds 200
	@RUNVOL_CLUSTER_TIER=1 RUNVOL_ROUNDS=10 .venv/bin/python -m pytest -s tests/cluster
	@tests/prepare/e2e.sh
	@.venv/bin/python -m tests.e2e

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench-kernel: prepare
	@.venv/bin/python -m tests.kernel.bench $(ARGS)

# ARGS="--before DIR" adds every call beside the same one of another checkout, prepared as this one is.
bench-lives: prepare
	@.venv/bin/python -m tests.kernel.lives $(ARGS)

bench: prepare
	@.venv/bin/python -m tests.bench $(ARGS)
	@.venv/bin/python -m tests.bench.flexvolume
	@.venv/bin/python -m tests.bench.nfs

clean:
	rm -rf .venv runvol_proto build dist *.egg-info demo-results bench-results
