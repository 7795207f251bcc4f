"""Operations on 32 neighbouring numbers at once, for compiled code whose loops must not depend on a vectoriser's luck.

Written as LLVM vectors of 32 lanes, which every processor's compiler breaks down to what it has (two registers with
AVX-512, four with AVX2), with the same results everywhere. Nothing is checked: the callers keep within the arrays.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

# Its type hints take the typing context for an argument of the call.
intrinsic: Any = _intrinsic

LANES = 32

_byte, _short, _int, _long = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_ints = ir.VectorType(_int, LANES)


def _all(value: int) -> ir.Constant:
    return ir.Constant(_ints, [value] * LANES)


def _splat(builder, scalar):
    vector = builder.insert_element(ir.Constant(_ints, ir.Undefined), scalar, ir.Constant(_int, 0))
    return builder.shuffle_vector(vector, vector, _all(0))


def _lanes_at(builder, pointer, index, element):
    """A pointer to LANES elements from index on."""
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
def mix(typingctx, source, start, step, count, weights, weights_start, shift, out, out_start):
    """out[out_start + i] = sum over k < count of source[start + k * step + i] * weights[weights_start + k], >> shift.

    For i < LANES, rounded. source: uint8 or int16, not negative. weights, out: int16. Arrays are flat, count >= 1.
    """
    signature = types.void(
        source, types.int64, types.int64, types.int64, weights, types.int64, types.int64, out, types.int64
    )
    element = _byte if source.dtype == types.uint8 else _short

    def generate(context, builder, signature, arguments):
        source, start, step, count, weights, weights_start, shift, out, out_start = arguments
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
            # Says that they are not negative: products of two 15-bit numbers have an instruction of their own.
            values = builder.and_(values, _all(0x7FFF))
        weight = builder.load(builder.gep(factors, [builder.add(weights_start, k)]))
        product = builder.mul(values, _splat(builder, builder.sext(weight, _int)))
        grown = builder.add(total, product)
        following = builder.add(k, ir.Constant(_long, 1))
        k.add_incoming(following, loop)
        total.add_incoming(grown, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        mixed = builder.trunc(builder.ashr(grown, _splat(builder, shift)), ir.VectorType(_short, LANES))
        _store(builder, mixed, _data(context, builder, signature.args[7], out), out_start, _short)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def colour(typingctx, luma, cb, cr, factors, out, out_start):
    """out[out_start + i] = the RGB pixel of luma, cb and cr [i], red in the lowest byte, for i < LANES.

    luma, cb, cr: int16 with 6 bits after the point. factors: four ints with 14 bits after the point, what of cr goes to
    red, what of cb and of cr is taken from green, what of cb goes to blue. out: int32. Arrays are flat.
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
    """Drops 20 bits after the point and clips to 0..255."""
    value = builder.ashr(value, _all(20))
    value = builder.select(builder.icmp_signed("<", value, _all(0)), _all(0), value)
    return builder.select(builder.icmp_signed(">", value, _all(255)), _all(255), value)


@intrinsic
def weave(typingctx, columns, words):
    """Packs LANES rows of eight RGB pixels into three 64-bit words each: words[j * LANES + i], j < 3, i < LANES.

    columns: int32 [8 * LANES], pixel j of row i at j * LANES + i, red in the lowest byte. words: int64. Both flat.
    """
    signature = types.void(columns, words)
    # Eight rows at a time: what 32 rows need would not fit the registers.
    few = 8
    ints, longs = ir.VectorType(_int, few), ir.VectorType(_long, few)

    def generate(context, builder, signature, arguments):
        pixels, target = (
            _data(context, builder, kind, array) for kind, array in zip(signature.args, arguments, strict=True)
        )
        for first in range(0, LANES, few):
            totals: list = [None] * 3
            for j in range(8):
                pointer = builder.gep(pixels, [ir.Constant(_long, j * LANES + first)])
                load = builder.load(builder.bitcast(pointer, ints.as_pointer()))
                load.align = 4
                column = builder.zext(load, longs)
                for word in range(3):
                    # Pixel j fills bits 24 j to 24 j + 23 of the three words.
                    shift = 24 * j - 64 * word
                    if -24 < shift < 64:
                        amount = ir.Constant(longs, [abs(shift)] * few)
                        moved = builder.shl(column, amount) if shift >= 0 else builder.lshr(column, amount)
                        totals[word] = moved if totals[word] is None else builder.or_(totals[word], moved)
            for word, total in enumerate(totals):
                pointer = builder.gep(target, [ir.Constant(_long, word * LANES + first)])
                builder.store(total, builder.bitcast(pointer, longs.as_pointer())).align = 8
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def join(typingctx, colours, out, out_start):
    """out[out_start + i] = red | green << 8 | blue << 16 for i < LANES.

    colours: int16 [3 * LANES], 0..255, first the reds. out: int32. Arrays are flat.
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
