"""Philox words and normals inside a kernel; :mod:`stopfast.kernels.noise` defines them."""

import triton
import triton.language as tl


@triton.jit
def signed_turns_to_sine_cosine(angle):
    """Cosine and sine of ``pi * 2**-31 * angle``, the word read as a signed number.

    The word's upper bits say the quadrant, and what is left of it is at most an eighth of a turn, so
    that two short series are accurate to fp32. ``tl.cos`` reduces any argument and keeps a slow path
    for large ones, which costs a kernel its registers and a stack.
    """
    shifted = angle + 0x20000000
    quadrant = shifted >> 30
    rest = (shifted & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    t = rest.to(tl.float32) * 1.4629180792671596e-09  # pi * 2**-31: at most pi / 4
    u = t * t
    sine = t + t * u * (
        -1.6666667e-01 + u * (8.3333310e-03 + u * (-1.9840874e-04 + u * 2.7525562e-06))
    )
    cosine = 1.0 + u * (
        -0.5 + u * (4.1666668e-02 + u * (-1.3888889e-03 + u * (2.4801587e-05 - u * 2.7557319e-07)))
    )
    swapped = (quadrant & 1) != 0
    c = tl.where(swapped, sine, cosine)
    s = tl.where(swapped, cosine, sine)
    c = tl.where((quadrant == 1) | (quadrant == 2), -c, c)
    s = tl.where(quadrant >= 2, -s, s)
    return c, s


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two standard normals of two words (uint32), in fp32."""
    uniform = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    c, s = signed_turns_to_sine_cosine(angle_word)
    return radius * c, radius * s


@triton.jit
def noise_tile(seed, step, sample, place, first_quad, QUADS: tl.constexpr):
    """Normals of rows that have a sample and a place: [ROWS, 4 * QUADS], channels ``4 * first_quad``...

    ``seed`` and ``step`` are int64 scalars, ``sample`` and ``place`` int64 [ROWS] (counter words 2
    and 1).
    """
    quad = (first_quad + tl.arange(0, QUADS)).to(tl.uint32)[None, :]
    shape: tl.constexpr = (sample.shape[0], QUADS)  # type: ignore[assignment]
    c0 = tl.broadcast_to(quad, shape)
    c1 = tl.broadcast_to(place.to(tl.uint32)[:, None], shape)
    c2 = tl.broadcast_to(sample.to(tl.uint32)[:, None], shape)
    c3 = tl.full(shape, 0, tl.uint32) + step.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
