"""What verifying costs: `python tests/bench_verify.py`.

A batch of a default run is 256 answers to puzzles, which cheap rules decide. Mathematics goes to
processes of its own; what that costs is shown beside it, for the first batch and for later ones.
"""

import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Sample  # noqa: E402
from engine import algebra  # noqa: E402
from engine.verify import verify_batch  # noqa: E402

BATCH = 256
GROUP = 8
STEP = 2.0  # seconds of a default step on two cores
COLOURS = ["white", "orange", "dark red", "red", "blue", "green", "black"]


def ordinary(seed: int) -> list:
    """256 answers to 32 questions: letters, colours, numbers, units, a few sentences."""
    rng = random.Random(seed)
    pairs = []
    for number in range(BATCH // GROUP):
        options = rng.sample(COLOURS, 4)
        listed = "".join(f"\n({x}) {option}" for x, option in zip("ABCD", options, strict=True))
        letter = rng.choice("ABCD")
        count = rng.randint(1, 99)
        choice = Sample(str(number), f"Which colour has plate {seed}-{number}?{listed}", letter)
        counted = Sample(str(number), f"How many lights flash in clip {seed}-{number}?", str(count))
        for _ in range(GROUP):
            said = rng.choice("ABCD")
            if number % 2:
                forms = [said, f"({said})", f"The answer is {said}.", rng.choice(options)]
                pairs.append((rng.choice(forms), choice))
            else:
                near = count + rng.randint(-3, 3)
                forms = [
                    str(near),
                    f"{near} lights",
                    f"{near}.0",
                    f"{near} cm",
                    f"\\frac{{{near}}}{{2}}",
                ]
                pairs.append((rng.choice(forms), counted))
    return pairs


def mathematics(seed: int) -> list:
    """256 answers to 32 questions that only algebra decides, half of them equal to another."""
    rng = random.Random(seed)
    pairs = []
    for number in range(BATCH // GROUP):
        a, b = rng.randint(2, 9), rng.randint(1, 9)
        sample = Sample(str(number), "", f"x^2+{a + b}x+{a * b}")
        for _ in range(GROUP):
            pairs.append((f"(x+{rng.randint(a - 1, a + 1)})(x+{rng.choice([b, b + 1])})", sample))
    return pairs


def median_ms(work, repeats: int) -> float:
    """Median of the milliseconds that work(seed) takes, each time on answers not seen before."""
    taken = []
    for seed in range(repeats):
        pairs = work(seed)
        started = time.perf_counter()
        verify_batch(pairs)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def verify(repeats: int = 15) -> dict:
    """Milliseconds for a batch of ordinary answers and of mathematics; prints and returns them."""
    result = {"ordinary_ms": median_ms(ordinary, repeats)}
    result["share_of_a_step"] = result["ordinary_ms"] / 1000 / STEP
    assert not algebra._idle(os.getpid())  # ordinary answers start no process
    started = time.perf_counter()
    verify_batch(mathematics(1000))
    result["first_mathematics_ms"] = 1000 * (time.perf_counter() - started)
    result["mathematics_ms"] = median_ms(mathematics, 3)
    print(f"{BATCH} ordinary answers: {result['ordinary_ms']:.1f} ms, ", end="")
    print(f"{100 * result['share_of_a_step']:.2f} % of a step of {STEP:.0f} s")
    print(f"{BATCH} in mathematics: {result['mathematics_ms']:.0f} ms, ", end="")
    print(f"the first time {result['first_mathematics_ms']:.0f} ms")
    return result


if __name__ == "__main__":
    verify()
