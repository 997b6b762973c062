# Appended to tests/e2e/test_policy_changes.py when it passes.
from tests.e2e.test_policy_changes import (
    ALLOW,
    DENY,
    HTTP,
    ROUNDS,
    Lab,
    Outcome,
    _seconds_until,
    lab,
    pytestmark,
    run_probe,
    world,
)  # noqa: F401


def test_no_connection_that_a_change_finds_half_open_is_left_hanging(lab: Lab) -> None:
    lab.apply(DENY)
    request = lab.request("x/client", "x/server", HTTP.number)
    for _ in range(3 * ROUNDS):
        lab.node("b").put(ALLOW)
        _seconds_until(lab, Outcome.CONNECTED)
        lab.node("b").put(DENY)
        while (result := run_probe(request)).outcome is Outcome.CONNECTED:
            pass
        assert result.seconds < 1.0, result
