"""PyTorch's calls for tests/bench/kernels: what a user would write for each op, composed where PyTorch has no op of that name, and the same with a result that is there already where PyTorch takes one: opd's results, too, are
warm memory, and a fresh one of 32 MiB and more costs glibc's malloc its pages anew. The faster of both counts."""
import time

try:
    import torch
except ImportError:
    torch = None

EPSILON = 1e-5


def version():
    return f"PyTorch {torch.__version__}" if torch else "PyTorch isn't installed: skipped"


def kind_of(dtype):
    return {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i8": torch.int8}.get(dtype)


def rms_norm(x, weight):
    if hasattr(torch.nn.functional, "rms_norm"):  # PyTorch 2.4 on
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, EPSILON)
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPSILON).to(x.dtype) * weight


def add_rms_norm(x, other, weight):
    total = x + other
    return rms_norm(total, weight), total


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(query, key, value):
    """query [heads, S, D]; key, value [kv_heads, keys, D]: the heads of a group are rows of one product."""
    groups = query.reshape(key.shape[0], -1, query.shape[-1])
    return torch.matmul(torch.softmax(torch.matmul(groups, key.transpose(1, 2)) * query.shape[-1] ** -0.5, -1), value)


def wide(op, kind, sizes):
    """The ops of "rows,hidden" (or "rows,size"), None for others."""
    functional = torch.nn.functional
    x, other, weight = (torch.randn(*sizes).to(kind), torch.randn(*sizes).to(kind), torch.ones(sizes[1]).to(kind))
    both = torch.randn(sizes[0], 2 * sizes[1]).to(kind) if "_and_" in op else None
    calls = {
        "rms_norm": lambda: rms_norm(x, weight),
        "fused_add_rms_norm": lambda: add_rms_norm(x, other, weight),
        "layer_norm": lambda: functional.layer_norm(x, (sizes[1],), weight, weight),
        "softmax": lambda: functional.softmax(x, -1),
        "argmax": lambda: torch.argmax(x, -1),
        "silu_and_mul": lambda: functional.silu(both[:, :sizes[1]]) * both[:, sizes[1]:],
        "mul_and_silu": lambda: both[:, :sizes[1]] * functional.silu(both[:, sizes[1]:]),
        "gelu_and_mul": lambda: functional.gelu(both[:, :sizes[1]]) * both[:, sizes[1]:],
        "silu": lambda: functional.silu(x),
        "gelu": lambda: functional.gelu(x),
        "relu": lambda: functional.relu(x),
        "sigmoid": lambda: torch.sigmoid(x),
        "add": lambda: torch.add(x, other),
        "sub": lambda: torch.sub(x, other),
        "mul": lambda: torch.mul(x, other),
        "cast": lambda: x.to(cast_of(kind)),
    }
    return calls.get(op)


def cast_of(kind):
    """What opd's generator casts to."""
    return torch.float32 if kind == torch.bfloat16 else torch.bfloat16


def wide_into(op, kind, sizes):
    """The ops of `wide` whose result may be given, None for others."""
    aten = torch.ops.aten
    x, other, y, weight = (torch.randn(*sizes).to(kind), torch.randn(*sizes).to(kind), torch.zeros(*sizes).to(kind), torch.ones(sizes[1]).to(kind))
    both = torch.randn(sizes[0], 2 * sizes[1]).to(kind) if "_and_" in op else None
    halves = (both[:, :sizes[1]], both[:, sizes[1]:]) if both is not None else None
    moments = [torch.zeros(sizes[0], 1) for _ in range(2)]
    wide_y = torch.zeros(*sizes).to(cast_of(kind))
    calls = {
        "layer_norm": lambda: aten.native_layer_norm.out(x, (sizes[1],), weight, weight, EPSILON, out0=y, out1=moments[0], out2=moments[1]),
        "softmax": lambda: torch.softmax(x, -1, out=y),
        "silu_and_mul": lambda: torch.mul(aten.silu.out(halves[0], out=y), halves[1], out=y),
        "mul_and_silu": lambda: torch.mul(aten.silu.out(halves[1], out=y), halves[0], out=y),
        "gelu_and_mul": lambda: torch.mul(aten.gelu.out(halves[0], out=y), halves[1], out=y),
        "silu": lambda: aten.silu.out(x, out=y),
        "gelu": lambda: aten.gelu.out(x, out=y),
        "relu": lambda: aten.relu.out(x, out=y),
        "sigmoid": lambda: torch.sigmoid(x, out=y),
        "add": lambda: torch.add(x, other, out=y),
        "sub": lambda: torch.sub(x, other, out=y),
        "mul": lambda: torch.mul(x, other, out=y),
        "cast": lambda: wide_y.copy_(x),
    }
    return calls.get(op)


def call_of(op, dtype, sizes):
    """A function of no arguments; None where PyTorch has no such op or dtype on the CPU."""
    kind = kind_of(dtype) if torch else None
    if kind is None or dtype == "i8":
        return None
    if op == "linear":
        x, weight = torch.randn(sizes[0], sizes[1]).to(kind), torch.randn(sizes[2], sizes[1]).to(kind)
        return lambda: torch.nn.functional.linear(x, weight)
    if op == "matmul":
        batch, rows, depth, columns = sizes
        a, b = torch.randn(batch, rows, depth).to(kind), torch.randn(batch, depth, columns).to(kind)
        return lambda: torch.matmul(a, b)
    if op in ("attention", "paged_attention"):
        batch, queries, keys, heads, kv_heads, size = sizes[:6]
        query = torch.randn(batch * heads, queries, size).to(kind)
        key, value = (torch.randn(batch * kv_heads, keys, size).to(kind) for _ in range(2))
        return lambda: attend(query, key, value)
    if op == "embedding":
        ids, table = torch.randint(sizes[1], (sizes[0],)), torch.randn(sizes[1], sizes[2]).to(kind)
        return lambda: torch.nn.functional.embedding(ids, table)
    if op == "topk":
        x = torch.randn(sizes[0], sizes[1]).to(kind)
        return lambda: torch.topk(x, sizes[2])
    if op == "rotary_embedding":
        tokens, heads, kv_heads, size = sizes[:4]
        query, key = torch.randn(tokens, heads, size).to(kind), torch.randn(tokens, kv_heads, size).to(kind)
        cos, sin = (torch.randn(tokens, 1, size // 2).to(kind) for _ in range(2))
        return lambda: (rotate(query, cos, sin), rotate(key, cos, sin))
    return wide(op, kind, sizes) if len(sizes) == 2 else None


def calls_of(op, dtype, sizes):
    """Every way to call it."""
    kind = kind_of(dtype) if torch else None
    into = wide_into(op, kind, sizes) if kind is not None and dtype != "i8" and len(sizes) == 2 else None
    return [call for call in (call_of(op, dtype, sizes), into) if call]


def timed(call):
    """Microseconds of one call: the median over 40 ms, five calls at least; short ones in batches of 20 us."""
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    repeats = 1 if first >= 20e-6 else int(20e-6 / (first + 1e-9)) + 1
    laps, start = [], time.perf_counter()
    while len(laps) < 5 or (time.perf_counter() - start < 0.04 and len(laps) < 400):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        laps.append((time.perf_counter() - began) / repeats)
    return 1e6 * sorted(laps)[len(laps) // 2]


def timed_or_none(call):
    try:
        return timed(call)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):  # not for this dtype, or not in this version
        return None


def time_us(op, dtype, sizes, call_cache={}):
    """Microseconds; None where there is no such call, or PyTorch refuses the dtype."""
    if torch is None:
        return None
    asked = (op, dtype, tuple(sizes))
    if asked not in call_cache:
        call_cache.clear()
        call_cache[asked] = calls_of(op, dtype, sizes)
    with torch.inference_mode():
        return min((us for us in map(timed_or_none, call_cache[asked]) if us is not None), default=None)
