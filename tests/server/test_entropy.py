from __future__ import annotations

import os

from mixtral_server.entropy import Entropy, random_int, token_hex


def test_no_byte_is_handed_out_twice() -> None:
    drawn: list[bytes] = []
    source = Entropy()
    taken = b"".join(source.take(48) for _ in range(400))
    drawn = [taken[at : at + 16] for at in range(0, len(taken), 16)]
    assert len(set(drawn)) == len(drawn)
    assert {len(source.take(count)) for count in (1, 4096)} == {1, 4096}


def test_a_forked_process_hands_out_others() -> None:
    token_hex(8)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, token_hex(16).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 32).decode() != token_hex(16)


def test_random_int_fills_its_bits() -> None:
    seen = [random_int(63) for _ in range(2000)]
    assert 0 <= min(seen) <= max(seen) < 2**63
    assert max(seen) > 2**62
    assert len(set(seen)) == len(seen)
    assert {random_int(1) for _ in range(200)} == {0, 1}
