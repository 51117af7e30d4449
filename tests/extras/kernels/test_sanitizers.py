"""native.c under the compiler's sanitizers: no byte beyond a buffer, no undefined
arithmetic, no race between threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanollama import KernelError
from nanollama_extras.kernels import native

try:
    COMPILER = native.find_compiler()
except KernelError:
    pytest.skip("there is no C compiler", allow_module_level=True)

MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# Buffers of exactly the size that the kernels may use, each an allocation of its own.
DATA = r"""
#include <stdio.h>

static uint64_t seed = 1;
static uint32_t any(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return seed >> 33;
}
static void *bytes(int64_t n) {
    uint8_t *p = malloc(n);
    for (int64_t i = 0; i < n; i++) p[i] = any();
    return p;
}
static float *floats(int64_t n) {
    float *p = malloc(n * sizeof(float));
    for (int64_t i = 0; i < n; i++) p[i] = (float)any() / (1u << 30) - 1;
    return p;
}
static uint8_t *ones(int64_t n) { /* as int32: read_all sums these, and shall not overflow */
    uint8_t *p = malloc(n);
    for (int64_t i = 0; i < n; i++) p[i] = i % 4 == 0;
    return p;
}
static matrix make(const int *format, int64_t rows, int64_t cols, int bias) {
    int bits = format[0], group = format[1], has_offset = format[2];
    int32_t block_bytes = 2 * group * bits + 32 + 32 * has_offset;
    int64_t num_bytes = (rows + 15) / 16 * (cols / group) * block_bytes;
    uint8_t *blocks = bytes(num_bytes);
    for (int64_t i = 0; i < num_bytes; i += block_bytes) /* scales that are numbers */
        for (int j = 2 * group * bits + 1; j < block_bytes; j += 2) blocks[i + j] &= 0x8f;
    return (matrix){blocks, bias ? floats(rows) : NULL, rows, cols, bits, group, has_offset,
                    format[3], block_bytes};
}
/* A matrix of floats, all of the same sign and size: their low halves and high ones are numbers */
static matrix make_floats(int kind, int64_t rows, int64_t cols, int bias) {
    int64_t num_bytes = rows * cols * float_bytes(kind), num_blocks = (rows + 31) / 32;
    uint8_t *from = malloc(num_bytes), *blocks = malloc(num_blocks * 32 * cols * float_bytes(kind));
    for (int64_t i = 0; i < num_bytes; i++) from[i] = i % 2 ? 0x3c + any() % 4 : any();
    lay_floats(&(lay_floats_call){from, blocks, rows, cols, kind}, num_blocks, 3);
    free(from);
    return (matrix){.blocks = blocks, .bias = bias ? floats(rows) : NULL, .rows = rows,
                    .cols = cols, .floats = kind};
}
static const int FORMATS_OF[6][4] = {{4, 32, 0, 0}, {4, 32, 1, 0}, {8, 32, 0, 0},
                                     {8, 32, 1, 0}, {8, 16, 0, 0}, {4, 32, 0, 1}};
static matrix any_matrix(int format, int64_t rows, int64_t cols) {
    int kind = format % 9 - 5; /* behind the packed formats */
    if (kind > 0) return make_floats(kind, rows, cols, format % 2);
    return make(FORMATS_OF[format % 9], rows, cols, format % 2);
}
static int64_t kv_block_bytes(int64_t D, int kind) {
    return 16 * (kind == Q8 ? D + 2 * (D / scale_group(D)) : kind == FLOAT16 ? 2 * D : 4 * D);
}
static void check(int ok, const char *what) {
    if (!ok) printf("%s differs\n", what), exit(1);
}
"""

MEMORY_MAIN = r"""
static void spoil(float *x, int64_t n) {
    const float bad[] = {0, 1e-45f, -1e-38f, 3e38f, -88.8f, -1e4f, 88.8f, INFINITY, -INFINITY, NAN};
    for (int64_t i = 0; i < n; i++)
        if (any() % 16 == 0) x[i] = bad[any() % 10];
}
static void try_linear(int format, int64_t rows, int64_t num_tokens, int before, int bad) {
    int64_t cols = before == NORM ? 96 : 64, gated = before >= SWIGLU && before <= CLAMPED_SWIGLU;
    int64_t width = gated ? 2 * cols : cols;
    matrix parts[] = {any_matrix(format, rows, cols), any_matrix(format + 1, 33 - rows % 33, cols)};
    int64_t num_rows = parts[0].rows + parts[1].rows, num_out = num_tokens * num_rows;
    float *x = floats(num_tokens * width), *norm = before == NORM ? floats(cols) : NULL;
    float *residual = format % 2 ? floats(num_out) : NULL;
    float *out = floats(num_out), *again = floats(num_out);
    if (bad) spoil(x, num_tokens * width);
    linear_call call = {.parts = parts, .num_parts = 2, .x = x, .norm = norm, .residual = residual,
                        .out = out, .before = before, .eps = 1e-5f};
    linear(&call, num_tokens, 1);
    call.out = again;
    linear(&call, num_tokens, 3);
    check(!memcmp(out, again, num_out * sizeof(float)), "linear");
    int64_t *ids = malloc(rows * sizeof(int64_t));
    float *all = floats(rows * cols);
    for (int64_t i = 0; i < rows; i++) ids[i] = rows - 1 - i;
    gather(&(gather_call){parts, ids, all}, rows, 1);
    void *made[] = {x, norm, residual, out, again, ids, all, (void *)parts[0].blocks,
                    (void *)parts[0].bias, (void *)parts[1].blocks, (void *)parts[1].bias};
    for (int i = 0; i < 11; i++) free(made[i]);
}
/* GGUF's blocks, laid out for a matrix */
static void try_blocks(int type, int64_t rows, int64_t num_tokens) {
    const struct gguf_type *k = gguf_types + type;
    static const int fine[] = {0, 0, ONE_SCALE, ONE_OFFSET, 0, MINS_32, MINS_32, SCALES_16};
    int64_t cols = 2 * k->wide, num_blocks = (rows + 15) / 16, num_out = num_tokens * rows;
    int32_t width = 2 * k->wide * k->bits + 16 * k->num_scales + 32 * k->num_halves;
    uint8_t *from = bytes(rows * 2 * k->num_bytes), *blocks = malloc(num_blocks * 2 * width);
    lay_blocks(&(lay_blocks_call){from, blocks, rows, cols, type}, num_blocks, 3);
    for (int64_t i = 0; i < num_blocks * 2; i++) /* scales that are numbers */
        for (int j = 1; j <= 32 * k->num_halves; j += 2) blocks[(i + 1) * width - j] &= 0x8f;
    matrix m = {.blocks = blocks, .rows = rows, .cols = cols, .bits = k->bits, .group = k->wide,
                .has_offset = k->num_halves == 2, .block_bytes = width, .fine = fine[type],
                .unit = 1, .centre = type == OF_Q5_0 ? 16 : type == OF_Q6_K ? 32 : 0};
    float *x = floats(num_tokens * cols), *out = floats(num_out), *again = floats(num_out);
    linear_call call = {.parts = &m, .num_parts = 1, .x = x, .out = out};
    linear(&call, num_tokens, 1);
    call.out = again;
    linear(&call, num_tokens, 3);
    check(!memcmp(out, again, num_out * sizeof(float)), "linear of blocks");
    int64_t last = rows - 1;
    gather(&(gather_call){&m, &last, x, 1}, 1, 1);
    void *made[] = {from, blocks, x, out, again};
    for (int i = 0; i < 5; i++) free(made[i]);
}
static void try_norm(int64_t n, int is_centred) {
    int64_t C = 48;
    float *x = floats(n * C), *weight = floats(C), *bias = is_centred ? floats(C) : NULL;
    float *residual = n % 2 ? floats(n * C) : NULL, *out = floats(n * C);
    norm(&(norm_call){x, weight, bias, residual, out, C, is_centred, 1e-5f}, n, 3);
    void *made[] = {x, weight, bias, residual, out};
    for (int i = 0; i < 5; i++) free(made[i]);
}
static void try_few_rows(int64_t n) {
    const int64_t C = 48, rows = 70;
    float *x = floats(n * C), *weight = floats(rows * C), *out = floats(n * rows);
    few_rows(&(few_rows_call){x, weight, out, C, rows}, n, 3);
    for (int64_t t = 0; t < n; t++) {
        float *one = floats(rows);
        few_rows(&(few_rows_call){x + t * C, weight, one, C, rows}, 1, 1);
        check(!memcmp(one, out + t * rows, rows * sizeof(float)), "few_rows");
        free(one);
    }
    free(x), free(weight), free(out);
}
static void try_streams(int64_t n, int64_t num, int bad) {
    const int64_t C = 48, size = n * C;
    float *x = floats(num * size), *router = floats(num * C), *coefs = floats(num * num * num);
    float *predicted = floats(num * size), *corrected = floats(num * size), *scale = floats(C);
    float *first[] = {floats(size), floats(size)}, *gates[] = {floats(2 * size), floats(2 * size)};
    memcpy(gates[1], gates[0], 2 * size * sizeof(float));
    if (bad) spoil(x, num * size);
    for (int i = 0; i < 2; i++) {
        altup_predict(&(altup_predict_call){.x = x, .router = router, .coefs = coefs,
                                            .out = predicted, .cols = C, .stride = size,
                                            .num_streams = num, .active = num - 1, .eps = 1e-6f},
                      n, i ? 3 : 1);
        altup_correct(&(altup_correct_call){.predicted = predicted, .x = x, .router = router,
                                            .coefs = coefs, .scale = num > 2 ? scale : NULL,
                                            .corrected = corrected, .out = first[i], .cols = C,
                                            .stride = size, .num_streams = num, .eps = 1e-6f},
                      n, i ? 3 : 1);
        match_scale(&(match_scale_call){x, corrected, i ? NULL : first[i], corrected, C, 1e-5f, 1},
                    n, 3);
        cut_gates(&(cut_gates_call){gates[i], C, 0.5f}, n, i ? 3 : 1);
    }
    check(bad || !memcmp(first[0], first[1], size * sizeof(float)), "altup");
    check(!memcmp(gates[0], gates[1], 2 * size * sizeof(float)), "cut_gates");
    void *made[] = {x, router, coefs, predicted, corrected, scale, first[0], first[1], gates[0],
                    gates[1]};
    for (int i = 0; i < 10; i++) free(made[i]);
}
static void try_experts(int format, int64_t num_tokens, int has_shared) {
    const int64_t C = 64, E = 5, wide = 96; /* the shared expert has more hidden columns */
    const matrix *gate_ups[6], *downs[6];
    for (int e = 0; e < 6; e++) {
        int64_t width = e < 5 ? 32 : wide;
        matrix *made = malloc(3 * sizeof(matrix));
        for (int i = 0; i < 2; i++) made[i] = any_matrix(format + e, width, C);
        made[2] = any_matrix(format, C, width);
        gate_ups[e] = made, downs[e] = made + 2;
    }
    int64_t n = num_tokens * C;
    float *x = floats(n), *out = floats(n), *again = floats(n), *gate = floats(E * C);
    float *bias = format % 2 ? floats(E) : NULL;
    float *shared = has_shared ? floats(C) : NULL, *residual = has_shared ? floats(n) : NULL;
    experts_call call = {
        .gate_ups = gate_ups, .downs = downs, .x = x, .gate = gate, .bias = bias,
        .shared_gate = shared, .residual = residual, .out = out, .num_parts = 2, .num_experts = E,
        .num_used = 1 + format % 5, .is_renormalized = has_shared, .before = SWIGLU, .cols = C};
    experts(&call, num_tokens, 1);
    call.out = again;
    experts(&call, num_tokens, 3);
    check(!memcmp(out, again, n * sizeof(float)), "experts");
    for (int e = 0; e < 6; e++) {
        matrix *made = (matrix *)gate_ups[e];
        for (int i = 0; i < 3; i++) free((void *)made[i].blocks), free((void *)made[i].bias);
        free(made);
    }
    void *made[] = {x, gate, bias, shared, residual, out, again};
    for (int i = 0; i < 7; i++) free(made[i]);
}
static void try_attention(int64_t H, int64_t Hkv, int64_t D, int kind, int64_t window, int bad) {
    const int64_t starts[] = {0, 15, 127}, news[] = {3, 1, 2}, layers = 2, num_tokens = 8;
    int64_t block_bytes = kv_block_bytes(D, kind), row = 1;
    int norms = H / Hkv % 3; /* HEAD, FULL or AFTER_ROPE */
    float *qkv = floats(num_tokens * (H + 2 * Hkv) * D);
    float *norm = window ? floats(norms == FULL ? H * D : D) : NULL;
    float *sinks = window ? floats(H) : NULL;
    float *cosines = floats(num_tokens * D / 2), *sines = floats(num_tokens * D / 2);
    float *out = floats(num_tokens * H * D), *again = floats(num_tokens * H * D);
    if (bad) spoil(qkv, num_tokens * (H + 2 * Hkv) * D);
    else memset(again, 0, num_tokens * H * D * 4), memset(out, 0, num_tokens * H * D * 4);
    span *spans = calloc(4, sizeof(span)); /* the last one has no tokens */
    for (int i = 0; i < 3; row += news[i++]) {
        int64_t num_blocks = window ? 8 : (starts[i] + news[i] + 15) / 16; /* of a ring, or not */
        int64_t num_bytes = 2 * layers * Hkv * num_blocks * block_bytes;
        spans[i] = (span){malloc(num_bytes), num_blocks, starts[i], news[i], row};
        memset(spans[i].strip, bad ? 0xff : 0, num_bytes);
    }
    float *outs[] = {out, again};
    for (int i = 0; i < 2; i++) {
        attention_call call = {
            .qkv = qkv, .cos = cosines, .sin = sines, .q_norm = norm, .k_norm = norm,
            .norms = norms, .q_scale = window ? cosines : NULL,
            .sinks = sinks, .spans = spans, .out = outs[i], .layer = 1, .n_layers = layers,
            .n_heads = H, .n_kv_heads = Hkv, .head_dim = D, .value_dim = D, .window = window,
            .ring = window ? 8 : 99, .kind = kind, .block_bytes = block_bytes, .eps = 1e-6f,
            .softcap = window};
        attention(&call, num_tokens, i ? 4 : 1);
    }
    check(bad || !memcmp(out, again, num_tokens * H * D * sizeof(float)), "attention");
    for (int i = 0; i < 3; i++) free(spans[i].strip);
    void *made[] = {qkv, norm, cosines, sines, sinks, out, again, spans};
    for (int i = 0; i < 8; i++) free(made[i]);
}
int main(void) {
    const int64_t rows[] = {1, 15, 16, 17, 50}, tokens[] = {0, 1, 2, 3, 5, 8, 9, 33};
    for (int format = 0; format < 9; format++)
        for (int r = 0; r < 5; r++)
            for (int n = 0; n < 8; n++)
                try_linear(format, rows[r], tokens[n], (format + r + n) % 7, n == 4);
    for (int type = OF_Q4_0; type <= OF_Q6_K; type++)
        for (int64_t n = 1; n < 20; n += 1 + n) try_blocks(type, 13 + n, n);
    for (int format = 0; format < 9; format++)
        for (int64_t n = 0; n < 9; n += 1 + n) {
            try_experts(format, n, n % 2);
            try_norm(n, format % 2);
            try_streams(n, 2 + format % 6, n == 3);
            try_few_rows(n);
        }
    for (int kind = FLOAT32; kind <= Q8; kind++)
        for (int64_t heads = 1; heads <= 8; heads++)
            for (int64_t D = 16; D <= 80; D += 16)
                try_attention(2 * heads, 2, D, kind, heads % 2 ? 0 : 5, heads == 3);
    for (int kind = FLOAT32; kind <= Q8; kind++) try_attention(2, 1, MAX_D, kind, 0, 0);
    for (int64_t n = 0; n < 3000; n += 251) {
        uint8_t *data = ones(n);
        for (int i = 1; i < 4; i++) check(read_all(data, n, i) == n / 256 * 64, "read_all");
        free(data);
    }
    return 0;
}
"""

THREADS_MAIN = r"""
static matrix parts[2];
static float *x, *expected, *qkv, *angles, *expected_rows;
static uint8_t *data;
enum { TOKENS = 9, COLS = 256, OUT = 80, HEADS = 6, D = 32, LENGTH = 270 };

static void attend(char *strip, int64_t start, int64_t n, float *out, int64_t num_threads) {
    span spans[2] = {{strip, (LENGTH + 15) / 16, start, n, 0}};
    attention_call call = {
        .qkv = qkv + start * (HEADS + 4) * D, .cos = angles, .sin = angles, .spans = spans,
        .out = out, .n_layers = 1, .n_heads = HEADS, .n_kv_heads = 2, .head_dim = D, .value_dim = D,
        .ring = 99, .kind = FLOAT16, .block_bytes = kv_block_bytes(D, FLOAT16)};
    attention(&call, n, num_threads);
}
static char *empty_strip(void) {
    return calloc((LENGTH + 15) / 16, 4 * kv_block_bytes(D, FLOAT16));
}
static void *caller(void *index) {
    int64_t num_threads = 1 + (intptr_t)index;
    float *out = malloc(TOKENS * OUT * 4), *rows = malloc(LENGTH * HEADS * D * 4);
    char *strip = empty_strip();
    for (int i = 0; i < 25; i++) {
        linear_call call = {.parts = parts, .num_parts = 2, .x = x, .out = out};
        step steps[] = {{linear, &call}, {linear, &call}};
        replay(steps, 2, TOKENS, num_threads);
        check(!memcmp(out, expected, TOKENS * OUT * 4), "linear");
        int64_t start = i ? LENGTH - 1 : 0; /* the whole prompt, then single tokens of its end */
        attend(strip, start, LENGTH - start, rows, num_threads);
        if (!i) check(!memcmp(rows, expected_rows, LENGTH * HEADS * D * 4), "attention");
        check(read_all(data, 1 << 16, num_threads) == 1 << 14, "read_all");
    }
    free(out), free(rows), free(strip);
    return NULL;
}
int main(void) {
    parts[0] = any_matrix(1, 50, COLS), parts[1] = any_matrix(7, 30, COLS);
    x = floats(TOKENS * COLS), expected = floats(TOKENS * OUT), data = ones(1 << 16);
    qkv = floats(LENGTH * (HEADS + 4) * D), angles = floats(LENGTH * D / 2);
    expected_rows = floats(LENGTH * HEADS * D);
    linear(&(linear_call){.parts = parts, .num_parts = 2, .x = x, .out = expected}, TOKENS, 1);
    char *strip = empty_strip();
    attend(strip, 0, LENGTH, expected_rows, 1);
    pthread_t threads[4];
    for (intptr_t i = 0; i < 4; i++) pthread_create(threads + i, NULL, caller, (void *)i);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    return 0;
}
"""


PYTHON_MAIN = r"""
import random, sys
from concurrent.futures import ThreadPoolExecutor

from nanollama_extras.kernels import native

native.KERNEL_FLAGS = ("-g", *native.KERNEL_FLAGS[1:], "-fsanitize=address")  # unoptimized

from nanollama import LLM

llm = LLM(sys.argv[1], quantize="q8", kernels="native", parallel=2, prefill_chunk=8, threads=2)
assert llm.engine.decode_steps is not None
texts = ["fox", "the quick brown", "jumps over the lazy dog " * 3, "the quick brown dog"]
expected = [llm.complete(text, seed=1, max_tokens=20).token_ids for text in texts]
logits = llm.logits([5, 6, 7])


def work(seed):
    choice = random.Random(seed)
    for _ in range(6):
        i, kind = choice.randrange(len(texts)), choice.randrange(6)
        if kind < 3:
            assert llm.complete(texts[i], seed=1, max_tokens=20).token_ids == expected[i]
        elif kind == 3:
            assert llm.logits([5, 6, 7]).equal(logits)
        elif kind == 4:
            for delta in llm.stream(texts, max_tokens=30, ignore_eos=True):
                break  # the others are cancelled
        else:
            llm.forget()
            llm.embed([texts[i]])


with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(8)))
print("done")
"""


def run(compiler: str, folder: Path, source: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compile a program and run it."""
    (folder / "program.c").write_text(source)
    command = [compiler, "-g", "-w", "-ffp-contract=off", *flags, "program.c", "-o", "program"]
    command += ["-lm", "-lpthread"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if built.returncode:
        return built
    return subprocess.run([folder / "program"], capture_output=True, text=True, check=False)


def checked(folder: Path, main: str, *flags: str) -> None:
    """Run the kernels under sanitizers; skip where those do not work."""
    empty = "#include <stdlib.h>\nint main() { free(malloc(3)); return 0; }"
    # clang takes a third of gcc's time for them
    compilers = [name for name in ("clang", COMPILER) if shutil.which(name)]
    probes = {name: run(name, folder, empty, *flags) for name in compilers}
    working = [name for name, probe in probes.items() if probe.returncode == 0]
    if not working:
        pytest.skip(f"{' '.join(flags)} does not work: {probes[COMPILER].stderr[:200]}")
    done = run(working[0], folder, native.SOURCE + DATA + main, *flags)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("cpu", [native.THIS_CPU, "-march=haswell", "-march=x86-64"])
def test_no_kernel_leaves_its_buffers_or_computes_what_is_undefined(
    tmp_path: Path, cpu: str
) -> None:
    if cpu == "-march=haswell" and "avx2" not in native.cpu_features():
        pytest.skip("this CPU lacks AVX2")
    checked(tmp_path, MEMORY_MAIN, *MEMORY, cpu)  # unoptimized: far quicker to compile


def test_threads_of_python_that_share_a_model_stay_within_its_memory(
    tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    """The kernels of a model that four threads use at once, under the address sanitizer."""
    found = subprocess.run(
        [COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    options = {"ASAN_OPTIONS": "detect_leaks=0", "NANOLLAMA_CACHE": str(tmp_path)}
    preloaded = {**os.environ, **options, "LD_PRELOAD": found.stdout.strip()}
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip(f"{COMPILER} has no libasan.so to load into Python")
    command = [sys.executable, "-c", PYTHON_MAIN, str(tiny("Llama"))]
    done = subprocess.run(command, env=preloaded, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


def test_threads_do_not_race(tmp_path: Path) -> None:
    checked(tmp_path, THREADS_MAIN, "-fsanitize=thread", "-O1", native.THIS_CPU)
