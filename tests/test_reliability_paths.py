"""Every attack of tests/path_attacks.py; what they are and came to is in RELIABILITY.md."""

import pytest

pytest.importorskip("onnx")
import path_attacks


def test_no_attack_gets_out(tmp_path):
    attacks = path_attacks.attacks()
    assert len(attacks) >= 100
    escapes = {attack.name: path_attacks.verdict(attack, tmp_path / str(i)) for i, attack in enumerate(attacks)}
    assert not {name: how for name, how in escapes.items() if how}


def test_the_canary_notices(tmp_path):
    """An attack that succeeds is seen, and so is one that nobody refuses."""

    def act(bundle, canary):
        canary.holds(b"anything").read_bytes()

    attack = path_attacks.Attack("reads the canary", act)
    assert path_attacks.verdict(attack, tmp_path / "work") == "the canary was opened"
    harmless = path_attacks.Attack("is allowed", lambda bundle, canary: canary.holds(b"anything"))
    assert path_attacks.verdict(harmless, tmp_path / "more") == "it was not refused"
