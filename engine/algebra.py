r"""Are two mathematical expressions equal? Asked of math-verify, in processes that may be killed.

`9^{9^{9^9}}` takes longer than anybody waits, and a policy in training writes it in the end. So
nothing here runs in the trainer, which may hold a GPU and threads: a worker is a Python program of
its own. It ends itself by an alarm of the kernel when an answer takes more than a second of
computing, also in the middle of one multiplication, and it ends when its input closes, which
happens however the trainer ends. A worker that is gone is replaced when the next one is needed.
Every process of a torchrun job has workers of its own. None is started before an expression has to
be compared.

This file imports nothing of the project, since the workers run it.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from multiprocessing.pool import ThreadPool

WORKERS = 2  # at most; one holds about 70 MiB
SECONDS = 1.0  # of computing for one pair; a busy machine does not shorten it
MEMORY = 2**31  # bytes of addresses a worker may use


# In the trainer -----------------------------------------------------------------------------------
def equal(pairs: list[tuple[str, str]]) -> list:
    """Compare (answer, reference) pairs of LaTeX expressions.

    For each pair: True, False (surely different), None (not understood, or it took too long), or,
    where both are real numbers and not both are whole, [answer, reference] as floats: how close
    they must be is for the caller to say.
    """
    with ThreadPool(WORKERS) as pool:
        return pool.map(_ask, pairs)


@functools.cache
def _idle(pid: int) -> list:
    """The workers of the process `pid` that wait: a forked copy of it must not use their pipes."""
    return []


def _start():
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the trainer
        text=True,
    )


def _ask(pair):
    """One pair to one worker; None if it died of it."""
    idle = _idle(os.getpid())
    worker = None
    while worker is None or worker.poll() is not None:  # one may have been killed as it waited
        try:
            worker = idle.pop()
        except IndexError:
            worker = _start()
    try:
        print(json.dumps(pair), file=worker.stdin, flush=True)
        reply = worker.stdout.readline()
    except BrokenPipeError:
        reply = ""
    if not reply:
        worker.kill()
        worker.wait()
        return None
    idle.append(worker)
    return json.loads(reply)


# In a worker --------------------------------------------------------------------------------------
def main():
    """Answer each line of the input, a JSON pair, with a line of JSON, until the input closes."""
    import resource

    replies = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no reply
    with contextlib.suppress(ValueError, OSError):  # not every system can limit it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _compare("x^2+1", r"\sqrt{2}x")  # the first takes long: it loads the library
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        try:
            reply = json.dumps(_compare(*json.loads(line)), allow_nan=False)
        except Exception:  # the library promises nothing about what it raises
            reply = "null"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, file=replies, flush=True)


def _compare(answer, reference):
    """As `equal`, for one pair. Raises anything at all for what is not understood."""
    import math_verify  # it takes a second, which the trainer does not pay
    from latex2sympy2_extended import NormalizationConfig

    mended = NormalizationConfig(malformed_operators=True)  # such as "\\sqrt x" without braces
    latex = math_verify.LatexExtractionConfig(normalization_config=mended)
    parsed = []
    for text in (answer, reference):
        found = math_verify.parse(f"${text}$", [latex], "no_fallback", parsing_timeout=None)
        parsed.append(found[0])
    if all(expression.is_comparable and expression.is_finite for expression in parsed):
        numbers = [expression.doit() for expression in parsed]
        if all(number.is_integer for number in numbers):
            return numbers[0] == numbers[1]
        return [float(number) for number in numbers]
    said, wanted = parsed
    if math_verify.verify(wanted, said, float_rounding=12, timeout_seconds=None):
        return True
    symbols = sorted(said.free_symbols | wanted.free_symbols, key=str)
    if not (symbols or said.is_number or wanted.is_number):  # collections of numbers
        return None if "." in answer + reference else False
    # Expressions are surely different if they are so where each variable has some value.
    values = {symbol: 0.7391 + 0.4142 * k for k, symbol in enumerate(symbols)}
    there = wanted.subs(values).evalf()
    difference = abs(said.subs(values).evalf() - there)
    return False if difference > 0.01 * abs(there) else None


if __name__ == "__main__":
    main()
