"""Operations on 32 adjacent numbers at once, for compiled code whose speed must not depend on automatic vectorisation.

They are LLVM vectors of 32 lanes, which LLVM splits into the processor's registers (two with AVX-512, four with AVX2),
with the same results everywhere. Indices are not checked: callers must stay within the arrays.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

# Its type hints count the typing context as an argument of the call.
intrinsic: Any = _intrinsic

LANES = 32
# Rows and columns of pixels written at a time.
SQUARE = 16

# Blocks that expand_blocks and fit_blocks process at a time, and the number of times that fit_blocks moves endpoints.
EXPANDED, FITTED = 8, 16
_ROUNDS = 3

_byte, _short, _int, _long = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_ints = ir.VectorType(_int, LANES)


def _all(value: int) -> ir.Constant:
    return ir.Constant(_ints, [value] * LANES)


def _splat(builder, scalar):
    vector = builder.insert_element(ir.Constant(_ints, ir.Undefined), scalar, ir.Constant(_int, 0))
    return builder.shuffle_vector(vector, vector, _all(0))


def _lanes_at(builder, pointer, index, element):
    """A pointer to LANES elements, starting at index."""
    return builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(element, LANES).as_pointer())


def _load(builder, pointer, index, element):
    load = builder.load(_lanes_at(builder, pointer, index, element))
    load.align = element.width // 8
    return load


def _store(builder, vector, pointer, index, element) -> None:
    store = builder.store(vector, _lanes_at(builder, pointer, index, element))
    store.align = element.width // 8


def _data(context, builder, array_type, array):
    return context.make_array(array_type)(context, builder, array).data


@intrinsic
def mix(typingctx, source, start, step, count, weights, weights_start, weights_step, shift, out, out_start):
    """out[out_start + i] = sum over k < count of source[start + k * step + i] * weights[w + k * weights_step].

    For i < LANES, with w = weights_start; each sum is shifted right by `shift` with rounding. source: uint8 or int16,
    not negative. weights, out: int16. Arrays are flat; count >= 1.
    """
    signature = types.void(
        source, types.int64, types.int64, types.int64, weights, types.int64, types.int64, types.int64, out, types.int64
    )
    element = _byte if source.dtype == types.uint8 else _short

    def generate(context, builder, signature, arguments):
        source, start, step, count, weights, weights_start, weights_step, shift, out, out_start = arguments
        pixels = _data(context, builder, signature.args[0], source)
        factors = _data(context, builder, signature.args[4], weights)
        shift = builder.trunc(shift, _int)
        half = builder.shl(ir.Constant(_int, 1), builder.sub(shift, ir.Constant(_int, 1)))
        before = builder.block
        loop = builder.append_basic_block("taps")
        after = builder.append_basic_block("mixed")
        first_sum = _splat(builder, half)
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_long)
        total = builder.phi(_ints)
        k.add_incoming(ir.Constant(_long, 0), before)
        total.add_incoming(first_sum, before)
        place = builder.add(start, builder.mul(k, step))
        values = builder.zext(_load(builder, pixels, place, element), _ints)
        if element is _short:
            # Shows LLVM that values are not negative: there is a special instruction for products of 15-bit numbers.
            values = builder.and_(values, _all(0x7FFF))
        weight = builder.load(builder.gep(factors, [builder.add(weights_start, builder.mul(k, weights_step))]))
        product = builder.mul(values, _splat(builder, builder.sext(weight, _int)))
        grown = builder.add(total, product)
        following = builder.add(k, ir.Constant(_long, 1))
        k.add_incoming(following, loop)
        total.add_incoming(grown, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        mixed = builder.trunc(builder.ashr(grown, _splat(builder, shift)), ir.VectorType(_short, LANES))
        _store(builder, mixed, _data(context, builder, signature.args[8], out), out_start, _short)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def transpose(typingctx, source, start, step, out, out_start):
    """out[out_start + i * LANES + k] = source[start + k * step + i] for i, k < LANES. Both are int16 and flat."""
    signature = types.void(source, types.int64, types.int64, out, types.int64)

    def generate(context, builder, signature, arguments):
        source, start, step, out, out_start = arguments
        shorts, target = (_data(context, builder, signature.args[i], array) for i, array in ((0, source), (3, out)))
        rows = [
            _load(builder, shorts, builder.add(start, builder.mul(step, ir.Constant(_long, k))), _short)
            for k in range(LANES)
        ]
        for i, row in enumerate(_transposed(builder, rows)):
            _store(builder, row, target, builder.add(out_start, ir.Constant(_long, i * LANES)), _short)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def colour(typingctx, luma, cb, cr, factors, out, out_start):
    """out[out_start + i] = the RGB pixel of luma, cb and cr [i], red in the lowest byte, for i < LANES.

    luma, cb, cr: int16 with 6 fractional bits. factors: four ints with 14 fractional bits: cr added to red, cb and cr
    subtracted from green, cb added to blue. out: int32. Arrays are flat.
    """
    signature = types.void(luma, cb, cr, factors, out, types.int64)

    def generate(context, builder, signature, arguments):
        luma, cb, cr, factors, out, out_start = arguments
        planes = [
            builder.sext(_load(builder, _data(context, builder, kind, plane), ir.Constant(_long, 0), _short), _ints)
            for kind, plane in zip(signature.args, (luma, cb, cr), strict=False)
        ]
        grey = builder.add(builder.shl(planes[0], _all(14)), _all(1 << 19))
        # Neutral chroma is 128.
        blue_difference, red_difference = (builder.sub(plane, _all(128 << 6)) for plane in planes[1:])
        cr_to_red, cb_to_green, cr_to_green, cb_to_blue = (
            _splat(builder, builder.trunc(factor, _int)) for factor in cgutils.unpack_tuple(builder, factors, 4)
        )
        red = builder.add(grey, builder.mul(red_difference, cr_to_red))
        green = builder.sub(grey, builder.mul(blue_difference, cb_to_green))
        green = builder.sub(green, builder.mul(red_difference, cr_to_green))
        blue = builder.add(grey, builder.mul(blue_difference, cb_to_blue))
        red, green, blue = (_to_byte(builder, value) for value in (red, green, blue))
        pixel = builder.or_(red, builder.or_(builder.shl(green, _all(8)), builder.shl(blue, _all(16))))
        _store(builder, pixel, _data(context, builder, signature.args[4], out), out_start, _int)
        return context.get_dummy_value()

    return signature, generate


def _to_byte(builder, value):
    """Drops 20 fractional bits and clips to 0..255."""
    value = builder.ashr(value, _all(20))
    value = builder.select(builder.icmp_signed("<", value, _all(0)), _all(0), value)
    return builder.select(builder.icmp_signed(">", value, _all(255)), _all(255), value)


@intrinsic
def write_pixels(typingctx, columns, start, out, out_start, stride):
    """Writes SQUARE rows of SQUARE RGB pixels, row i at out[out_start + i * stride].

    columns: int32, pixel j of row i at start + j * LANES + i, red in the lowest byte. out: uint8. Both are flat.
    """
    signature = types.void(columns, types.int64, out, types.int64, types.int64)
    line, byte_line = ir.VectorType(_int, SQUARE), ir.VectorType(_byte, SQUARE * 4)
    rgb_line = ir.VectorType(_byte, SQUARE * 3)
    rgb = ir.Constant(ir.VectorType(_int, SQUARE * 3), [i // 3 * 4 + i % 3 for i in range(SQUARE * 3)])

    def generate(context, builder, signature, arguments):
        columns, start, out, out_start, stride = arguments
        pixels, target = (_data(context, builder, signature.args[i], array) for i, array in ((0, columns), (2, out)))
        rows = []
        for j in range(SQUARE):
            place = builder.gep(pixels, [builder.add(start, ir.Constant(_long, j * LANES))])
            rows.append(builder.load(builder.bitcast(place, line.as_pointer())))
            rows[-1].align = 4
        for i, row in enumerate(_transposed(builder, rows)):
            row = builder.bitcast(row, byte_line)
            place = builder.gep(target, [builder.add(out_start, builder.mul(stride, ir.Constant(_long, i)))])
            pointer = builder.bitcast(place, rgb_line.as_pointer())
            builder.store(builder.shuffle_vector(row, row, rgb), pointer).align = 1
        return context.get_dummy_value()

    return signature, generate


def _transposed(builder, rows: list) -> list:
    """Transposes n vectors of n (a power of two) elements by perfect shuffles (each moves a bit from row to column)."""
    n = len(rows)
    halves = [
        ir.Constant(ir.VectorType(_int, n), [first + i // 2 + i % 2 * n for i in range(n)]) for first in (0, n // 2)
    ]
    for _ in range(n.bit_length() - 1):
        pairs = zip(rows[: n // 2], rows[n // 2 :], strict=True)
        rows = [builder.shuffle_vector(a, b, half) for a, b in pairs for half in halves]
    return rows


@intrinsic
def join(typingctx, colours, out, out_start):
    """out[out_start + i] = red | green << 8 | blue << 16 for i < LANES.

    colours: int16 [3 * LANES], 0..255: all reds, greens, blues. out: int32. Arrays are flat.
    """
    signature = types.void(colours, out, types.int64)

    def generate(context, builder, signature, arguments):
        source, target = (
            _data(context, builder, kind, array) for kind, array in zip(signature.args, arguments[:2], strict=False)
        )
        red, green, blue = (
            builder.zext(_load(builder, source, ir.Constant(_long, c * LANES), _short), _ints) for c in range(3)
        )
        pixel = builder.or_(red, builder.or_(builder.shl(green, _all(8)), builder.shl(blue, _all(16))))
        _store(builder, pixel, target, arguments[2], _int)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def expand_blocks(typingctx, blocks, start, out, out_start, stride):
    """Expands EXPANDED adjacent BC4 blocks, from blocks[start] on, to 4 rows of pixels, at out[out_start + y * stride].

    Each pixel is its step between the endpoints, rounded to the nearest integer. blocks, out: uint8. Arrays are flat.
    """
    signature = types.void(blocks, types.int64, out, types.int64, types.int64)
    few = EXPANDED
    words, shorts = ir.VectorType(_long, few), ir.VectorType(_short, few)
    wide = ir.VectorType(_short, LANES)
    # One bit of each code.
    ones = sum(1 << 3 * i for i in range(16))

    def generate(context, builder, signature, arguments):
        blocks, start, out, out_start, stride = arguments
        source = builder.gep(_data(context, builder, signature.args[0], blocks), [start])
        load = builder.load(builder.bitcast(source, words.as_pointer()))
        load.align = 1

        def constant(value: int):
            return ir.Constant(words, [value] * few)

        def shifted(vector, amount: int):
            return builder.lshr(vector, constant(amount)) if amount >= 0 else builder.shl(vector, constant(-amount))

        def spread(vector):
            """Repeats each block's number for its four pixels of a row."""
            few_shorts = builder.trunc(vector, shorts)
            mask = ir.Constant(_ints, [i // 4 for i in range(LANES)])
            return builder.shuffle_vector(few_shorts, few_shorts, mask)

        # Convert the codes to steps 0 to 7 from endpoint 0 to endpoint 1, all 16 of a block at once: code 0 stays,
        # code 1 becomes 7, and the others decrease by one.
        low, middle, high = (builder.and_(shifted(load, 16 + bit), constant(ones)) for bit in range(3))
        borrow = builder.xor(low, constant(ones))
        borrow_on = builder.and_(borrow, builder.xor(middle, constant(ones)))
        turned = builder.xor(builder.or_(middle, high), constant(ones))
        bits = [builder.xor(bit, turned) for bit in (borrow, builder.xor(middle, borrow), builder.xor(high, borrow_on))]
        steps = builder.or_(bits[0], builder.or_(shifted(bits[1], -1), shifted(bits[2], -2)))

        # 7 fractional bits fit in 16 bits; a seventh as 4681 / 2^15 is precise enough to round correctly.
        first, second = builder.and_(load, constant(255)), builder.and_(shifted(load, 8), constant(255))
        seventh = builder.mul(builder.sub(first, second), constant(4681))
        seventh = spread(builder.ashr(builder.add(seventh, constant(128)), constant(8)))
        begin = spread(builder.add(shifted(first, -7), constant(64)))
        pixels = _data(context, builder, signature.args[2], out)
        # A multiplication moves each pixel's code to the same bits, since not all processors can shift each lane
        # by a different amount.
        places = ir.Constant(wide, [1 << 9 - 3 * (i % 4) for i in range(LANES)])
        for row in range(4):
            codes = builder.mul(spread(shifted(steps, 12 * row)), places)
            codes = builder.and_(builder.lshr(codes, ir.Constant(wide, [9] * LANES)), ir.Constant(wide, [7] * LANES))
            value = builder.sub(begin, builder.mul(codes, seventh))
            value = builder.trunc(builder.lshr(value, ir.Constant(wide, [7] * LANES)), ir.VectorType(_byte, LANES))
            place = builder.add(out_start, builder.mul(stride, ir.Constant(_long, row)))
            _store(builder, value, pixels, place, _byte)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def fit_blocks(typingctx, pixels, start, stride, words, words_start):
    """Encodes 4 rows of pixels at pixels[start + y * stride] as FITTED adjacent BC4 blocks, words[words_start + i].

    The endpoints start at a block's extremes and are moved three times, each time to the least-squares fit to the
    block's codes; the best of the four pairs is used. pixels: uint8. words: uint64. Arrays are flat.
    """
    signature = types.void(pixels, types.int64, types.int64, words, types.int64)
    floats, ints, longs = (ir.VectorType(element, FITTED) for element in (ir.FloatType(), _int, _long))
    row_of_bytes = ir.VectorType(_byte, 4 * FITTED)

    def generate(context, builder, signature, arguments):
        pixels, start, stride, words, words_start = arguments
        source = _data(context, builder, signature.args[0], pixels)

        def constant(value: float):
            return ir.Constant(floats, [value] * FITTED)

        def largest(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def smallest(a, b):
            return builder.select(builder.fcmp_ordered("<", a, b), a, b)

        def rounded_down(a):
            """Rounds numbers that are not negative."""
            return builder.sitofp(builder.fptosi(a, ints), floats)

        def within(a, low: float, high: float):
            """Rounds and clips."""
            a = builder.fadd(a, constant(0.5))
            return rounded_down(smallest(largest(a, constant(low)), constant(high)))

        def per_level(high, low):
            return builder.fdiv(constant(7), builder.fsub(high, low))

        def step_of(value, high, scale):
            """Returns the nearest of the eight steps from endpoint 0 to endpoint 1."""
            return within(builder.fmul(builder.fsub(high, value), scale), 0, 7)

        values = []
        for y in range(4):
            place = builder.gep(source, [builder.add(start, builder.mul(stride, ir.Constant(_long, y)))])
            row = builder.load(builder.bitcast(place, row_of_bytes.as_pointer()))
            row.align = 1
            for x in range(4):
                mask = ir.Constant(ints, [4 * i + x for i in range(FITTED)])
                values.append(builder.uitofp(builder.shuffle_vector(row, row, mask), floats))
        high = low = total = values[0]
        for value in values[1:]:
            high, low, total = largest(high, value), smallest(low, value), builder.fadd(total, value)
        # Endpoints must differ; a flat block uses only one of them.
        high = largest(high, constant(1))
        low = smallest(low, builder.fsub(high, constant(1)))

        best_high, best_low, best_error = high, low, constant(float("inf"))
        for fit in range(1 + _ROUNDS):
            scale, span = per_level(high, low), builder.fsub(high, low)
            error = steps = squares = products = constant(0)
            for value in values:
                step = step_of(value, high, scale)
                sevenths = builder.fsub(builder.fmul(constant(7), high), builder.fmul(step, span))
                # Rounded as in expand_blocks.
                shown = rounded_down(builder.fmul(builder.fadd(sevenths, constant(3.5)), constant(1 / 7)))
                off = builder.fsub(shown, value)
                error = builder.fadd(error, builder.fmul(off, off))
                steps = builder.fadd(steps, step)
                squares = builder.fadd(squares, builder.fmul(step, step))
                products = builder.fadd(products, builder.fmul(step, value))
            better = builder.fcmp_ordered("<", error, best_error)
            best_error, best_high, best_low = (
                builder.select(better, new, old)
                for new, old in ((error, best_error), (high, best_high), (low, best_low))
            )
            if fit < _ROUNDS:
                # The least-squares line of pixels over steps; horizontal if all have the same step.
                spread = builder.fsub(builder.fmul(constant(16), squares), builder.fmul(steps, steps))
                slope = builder.fsub(builder.fmul(constant(16), products), builder.fmul(steps, total))
                slope = builder.fdiv(slope, largest(spread, constant(1)))
                begin = builder.fmul(builder.fsub(total, builder.fmul(slope, steps)), constant(1 / 16))
                high = within(begin, 1, 255)
                low = within(builder.fadd(begin, builder.fmul(constant(7), slope)), 0, 255)
                low = smallest(low, builder.fsub(high, constant(1)))

        word = builder.fptoui(best_high, longs)
        word = builder.or_(word, builder.shl(builder.fptoui(best_low, longs), ir.Constant(longs, [8] * FITTED)))
        scale = per_level(best_high, best_low)
        for number, value in enumerate(values):
            step = builder.fptosi(step_of(value, best_high, scale), ints)
            code = builder.add(step, ir.Constant(ints, [1] * FITTED))
            for is_step, becomes in ((0, 0), (7, 1)):
                hit = builder.icmp_signed("==", step, ir.Constant(ints, [is_step] * FITTED))
                code = builder.select(hit, ir.Constant(ints, [becomes] * FITTED), code)
            places = ir.Constant(longs, [16 + 3 * number] * FITTED)
            word = builder.or_(word, builder.shl(builder.zext(code, longs), places))
        target = builder.gep(_data(context, builder, signature.args[3], words), [words_start])
        builder.store(word, builder.bitcast(target, longs.as_pointer())).align = 8
        return context.get_dummy_value()

    return signature, generate
