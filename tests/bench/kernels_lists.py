"""From a table of measured times to the default lists of providers (providers/measured.tsv to providers/priorities.txt).

A table has a line a figure: op, dtype, sizes, threads, provider, microseconds, with tabs between them, and lines that begin with # say what was measured and on
what. Such a line after figures begins another machine's: every machine's figures of a size count, so that the lists are the best compromise for all of them. An op gets a plain list, in the order of the geometric means of its providers' times over the best one's; a dtype, and within it a class of up to so many
rows, gets a list of its own where that would begin otherwise."""
import math

NARROW_ROWS = (1, 8, 32)  # the classes: up to so many rows
TIE = 1.05  # a module must beat `cpu` by more: figures wander by that, and `cpu` promises bits that don't depend on the number of rows


def rows_of(op, sizes):
    return sizes[0] * sizes[1] if op == "matmul" else sizes[0]


def read(lines):
    """{op: [(dtype, sizes, {provider: microseconds})]} in the order of the lines; a size comes once for each machine that has figures of it."""
    found, machine, heading = {}, 0, True
    for line in lines:
        if line.startswith("#") or not line.strip():
            machine, heading = machine + (0 if heading else 1), True
            continue
        heading = False
        op, dtype, sizes, _threads, provider, us = line.split()
        found.setdefault(op, {}).setdefault((machine, dtype, tuple(map(int, sizes.split(",")))), {})[provider] = float(us)
    return {op: [(dtype, sizes, times) for (_, dtype, sizes), times in figures.items()] for op, figures in found.items()}


def ordered(rows):
    """The order over several {provider: microseconds}; a size that a provider doesn't take counts for the others only."""
    def mean(name):
        logs = [math.log(times[name] / min(times.values())) for times in rows if name in times]
        return sum(logs) / len(logs) - (math.log(TIE) if name == "cpu" else 0)
    return sorted({name for times in rows for name in times} - {"native"}, key=mean) + ["native"]


def differs(order, wider):
    """A list for fewer calls says something that the wider one doesn't."""
    return order != [name for name in wider if name in order]


def classes_of(op, dtype, mine):
    """mine: [(rows, times)]. The order of what is beyond all classes, and [(key, order)] of those that begin otherwise."""
    found, before = [], 0
    for most in NARROW_ROWS:
        here = [times for rows, times in mine if before < rows <= most]
        if here:
            found.append((f"{op}/{dtype}/rows<={most}", ordered(here)))
            before = most
    rest = [times for rows, times in mine if rows > before]
    order = ordered(rest) if rest else found.pop()[1]
    while found and not differs(found[-1][1], order):
        found.pop()
    return order, [item for at, item in enumerate(found) if at + 1 == len(found) or found[at + 1][1] != item[1]]


def lists_of(op, figures):
    """Yields (key, order): the plain list, then those that narrow it."""
    plain = ordered([times for _, _, times in figures])
    yield op, plain
    for dtype in dict.fromkeys(dtype for dtype, _, _ in figures):
        order, narrower = classes_of(op, dtype, [(rows_of(op, sizes), times) for kind, sizes, times in figures if kind == dtype])
        if differs(order, plain):
            yield f"{op}/{dtype}", order
        yield from narrower


def write(lines):
    """The text of providers/priorities.txt for a table's lines."""
    lists = ["*=cpu,native"]
    for op, figures in read(lines).items():
        lists += [f"{key}={','.join(order)}" for key, order in lists_of(op, figures)]
    return ("# The order among providers that holds where nobody says, one list a line, in the form of `opd --priority`.\n"
            "# Made of providers/measured.tsv by tests/bench/kernels --lists; a module that nobody has configured is passed over.\n" + "\n".join(lists) + "\n")
