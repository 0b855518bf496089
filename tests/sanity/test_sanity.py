"""csi-sanity: every spec an item, for runc and for sandboxes, for mounts and for raw block."""

from __future__ import annotations

import pytest

from tests.sanity import skips, wrapper

pytestmark = [pytest.mark.sanity, pytest.mark.kernel]

configurations = pytest.mark.parametrize("configuration", wrapper.CONFIGURATIONS, ids=str)


@configurations
@pytest.mark.parametrize("spec", wrapper.must_run())
def test_spec(configuration, spec):
    outcome = wrapper.run(configuration).outcomes[spec]
    if outcome.state in ("skipped", "pending"):
        why = skips.reason(spec, configuration.backend, configuration.runtime)
        assert why is not None, f"csi-sanity skipped a spec that must run: {outcome.message}"
        pytest.skip(why)
    assert outcome.state == "passed", outcome.message


@configurations
def test_csi_sanity_has_the_specs_on_record_and_no_others(configuration):
    assert sorted(wrapper.run(configuration).outcomes) == sorted(wrapper.must_run())


@configurations
def test_csi_sanity_leaves_nothing_behind(configuration):
    left = wrapper.run(configuration).left_over
    assert not any(left.values()), left


@configurations
def test_no_allowed_skip_is_stale(configuration):
    """What runs now must not stay on the list."""
    ran = {spec for spec, outcome in wrapper.run(configuration).outcomes.items() if outcome.state == "passed"}
    assert not [spec for spec in ran if skips.reason(spec, configuration.backend, configuration.runtime)]


def test_the_tool_is_the_version_on_record():
    assert wrapper.binary().name.endswith(wrapper.VERSION)
