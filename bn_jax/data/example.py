"""tf.train.Example without TensorFlow: the few lines of protobuf's wire format that it needs.

message Example   { Features features = 1; }
message Features  { map<string, Feature> feature = 1; }   // an entry has key = 1, value = 2
message Feature   { oneof { BytesList = 1; FloatList = 2; Int64List = 3; } }
message BytesList { repeated bytes value = 1; }           // Int64List: varints, packed or not
"""

from collections.abc import Iterator

Value = bytes | int


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint is too long")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: integers and length-delimited parts."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
        elif kind == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field is longer than its message")
            yield tag >> 3, data[at : at + length]
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} is unknown")


def _part(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should")
    return value


def _feature(data: memoryview) -> list[Value]:
    values: list[Value] = []
    for kind, items in _fields(data):
        for _, item in _fields(_part(items)):
            if kind == 1:
                values.append(bytes(_part(item)))
            elif kind == 3 and isinstance(item, int):
                values.append(item)
            elif kind == 3:
                packed, at = _part(item), 0
                while at < len(packed):
                    value, at = _varint(packed, at)
                    values.append(value)
    return [v - 2**64 if isinstance(v, int) and v >= 2**63 else v for v in values]


def parse(data: bytes) -> dict[str, list[Value]]:
    """The bytes and integer features of a serialized Example; lists of floats come back empty.
    Raises ValueError if it is none."""
    features: dict[str, list[Value]] = {}
    try:
        for number, message in _fields(memoryview(data)):
            for _, entry in _fields(_part(message)) if number == 1 else ():
                pair = dict(_fields(_part(entry)))
                features[bytes(_part(pair[1])).decode()] = _feature(
                    _part(pair.get(2, memoryview(b"")))
                )
    except (IndexError, KeyError, UnicodeDecodeError) as e:
        raise ValueError(f"not a tf.train.Example ({e})") from None
    return features


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    value &= 2**64 - 1
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _delimited(number: int, data: bytes) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(len(data)) + data


def _entry(name: str, value: Value) -> bytes:
    if isinstance(value, int):
        feature = _delimited(3, _delimited(1, _encode_varint(value)))
    else:
        feature = _delimited(1, _delimited(1, value))
    return _delimited(1, _delimited(1, name.encode()) + _delimited(2, feature))


def serialize(features: dict[str, Value]) -> bytes:
    """A serialized Example with one value a feature, in the order of their names."""
    return _delimited(1, b"".join(_entry(name, value) for name, value in sorted(features.items())))


def serialized_size(features: dict[str, Value], name: str, size: int) -> int:
    """len(serialize(...)) of these features and one more, `name`, of `size` bytes that need not
    exist."""

    def delimited(n: int) -> int:
        return 1 + len(_encode_varint(n)) + n

    others = sum(len(_entry(*item)) for item in features.items())
    key, feature = delimited(len(name.encode())), delimited(delimited(delimited(size)))
    return delimited(others + delimited(key + feature))
