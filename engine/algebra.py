r"""Are two mathematical expressions equal? Asked of math-verify, in processes that may be killed.

`9^{9^{9^9}}` takes longer than anybody waits, and a policy in training writes it in the end. So
nothing here runs in the trainer, which may hold a GPU and threads: a worker is a Python program of
its own. It ends itself by an alarm of the kernel when an answer takes longer than a second, also
in the middle of one multiplication, and it ends when its input closes, which happens however the
trainer ends. A worker that is gone is replaced when the next one is needed. Every process of a
torchrun job has workers of its own. None is started before an expression has to be compared.

This file imports nothing of the project, since the workers run it.
"""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
from multiprocessing.pool import ThreadPool

WORKERS = 2  # at most; one holds about 70 MiB
SECONDS = 1.0  # of real time for one pair
MEMORY = 2**31  # bytes of addresses a worker may use


# In the trainer -----------------------------------------------------------------------------------
def equal(pairs: list[tuple[str, str]]) -> list:
    """Compare (answer, reference) pairs of LaTeX expressions.

    For each pair: True, False (surely different), None (not understood, or it took too long), or,
    where both are real numbers and not both are whole, [answer, reference] as floats: how close
    they must be is for the caller to say.
    """
    if not pairs:
        return []
    with ThreadPool(min(WORKERS, len(pairs))) as pool:
        return pool.map(_ask, pairs, chunksize=1)


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
        worker.stdin.write(json.dumps(pair) + "\n")
        worker.stdin.flush()
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
    import logging
    import resource

    import math_verify  # it takes a second, which the trainer does not pay
    from latex2sympy2_extended import NormalizationConfig

    logging.disable()
    replies = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no reply
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
    with contextlib.suppress(ValueError, OSError):  # not every system can limit it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    normalization = NormalizationConfig(malformed_operators=True, boxed="none")
    latex = math_verify.LatexExtractionConfig(normalization_config=normalization)
    _compare("x^2+1", r"\sqrt{2}x", math_verify, latex)  # the first takes long: it loads more
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            reply = _compare(*json.loads(line), math_verify, latex)
        except Exception:  # the library promises nothing about what it raises
            reply = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _compare(answer, reference, math_verify, latex):
    parsed = []
    for text in (answer, reference):
        found = math_verify.parse(f"${text}$", [latex], "no_fallback", parsing_timeout=None)
        if not found:
            return None
        parsed += found[:1]
    numbers = [_number(expression) for expression in parsed]
    if None not in numbers:
        whole = [expression.doit().is_integer for expression in parsed]
        return numbers if not all(whole) else bool(parsed[0].doit() == parsed[1].doit())
    if math_verify.verify(parsed[1], parsed[0], float_rounding=12, timeout_seconds=None):
        return True
    return _surely_different(*parsed)


def _number(expression):
    """The float that the expression is, or None: it has variables, is a set, is not real."""
    try:
        number = float(expression.evalf(17))
    except (TypeError, AttributeError):
        return None
    return number if math.isfinite(number) else None


def _surely_different(answer, reference):
    """False if they are different collections, or differ where each variable has some value.

    None if neither can be seen.
    """
    import sympy

    symbols = sorted(answer.free_symbols | reference.free_symbols, key=str)
    collections = sympy.Set, sympy.Tuple, sympy.MatrixBase
    if isinstance(answer, collections) and isinstance(reference, collections):
        rounded = answer.has(sympy.Float) or reference.has(sympy.Float)
        return None if symbols or rounded else False
    values = {symbol: 0.7391 + 0.4142 * k for k, symbol in enumerate(symbols)}
    there = reference.subs(values).evalf()
    difference = abs(answer.subs(values).evalf() - there)
    return False if difference > 0.01 * abs(there) else None


if __name__ == "__main__":
    main()
