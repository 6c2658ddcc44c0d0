"""Types that threads meet at the same time."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Types that nobody has decoded, each by several threads at the same moment, which change places
# as often as they can.
_MEET = """
import sys, threading
import msgspec
from banger import decoding

threads, types = 4, 150
sys.setswitchinterval(1e-6)
kinds = []
for number in range(types):
    inner = msgspec.defstruct(f"Inner{number}", [(f"i{n}", int | None, None) for n in range(8)])
    fields = [(f"f{n}", list[inner] | None, None) for n in range(8)]
    kinds.append(msgspec.defstruct(f"Outer{number}", fields))
barrier = threading.Barrier(threads)

def decode(decoder):
    for kind in kinds:
        barrier.wait()
        assert decoder(b'{"f7":[{"i7":7}]}', type=kind).f7[0].i7 == 7

if sys.argv[1] == "convert":
    decoder = lambda data, type: decoding.convert(msgspec.json.decode(data), type)
elif sys.argv[1] == "raw":
    decoder = msgspec.json.decode
else:
    decoder = decoding.decode_json
workers = [threading.Thread(target=decode, args=(decoder,)) for _ in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print("met")
"""


@pytest.mark.parametrize("how", ["json", "convert"])
def test_threads_meet_a_type_one_after_the_other(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", _MEET, how], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "met\n"), done.stderr
