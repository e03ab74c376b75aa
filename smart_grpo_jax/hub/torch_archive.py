"""Where the members of a torch file lie: the directory of a zip archive whose members are stored as they are.

torch stores its storages uncompressed, so a tensor is a plain range of the file. Only that kind of archive is
read: nothing is ever unpacked, and no length is believed before it is compared with the file's.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from smart_grpo_jax.hub.torch_names import Refused

MEMBERS = 100_000
"""The most members of an archive."""

DIRECTORY = 16 * 2**20
"""Bytes of the longest directory that is read."""

END, END_WIDE, LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"
ENTRY, LOCAL = b"PK\1\2", b"PK\3\4"
WIDE = 0xFFFFFFFF
"""A 32-bit field with this value has its number in a 64-bit field elsewhere."""


class Member(NamedTuple):
    """One file of the archive: the offset of its header, its length, its checksum."""

    header: int
    size: int
    crc: int


def directory(path: Path) -> dict[str, Member]:
    """name → member. A compressed or encrypted one, or two of one name, are refused."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        count, size, start = end_record(file, length)
        if not count <= MEMBERS or not size <= DIRECTORY or start + size > length:
            raise Refused(f"its zip directory is impossible: {count} members in {size} bytes at {start}")
        file.seek(start)
        entries = file.read(size)
    found: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        name, member, at = entry(entries, at)
        if name in found:
            raise Refused(f"its zip archive has {name[:60]!r} twice")
        if member.header + member.size > length:
            raise Refused(f"{name[:60]!r} reaches beyond the end of the file")
        found[name] = member
    return found


def end_record(file: BinaryIO, length: int) -> tuple[int, int, int]:
    """(members, bytes, offset) of the directory, from the record at the end of the file."""
    file.seek(max(0, length - 22 - 0xFFFF))
    tail = file.read(22 + 0xFFFF)
    at = tail.rfind(END)
    if at < 0 or len(tail) - at < 22:
        raise Refused("it is cut: a zip archive without its end")
    disk, first, here, count, size, start = struct.unpack("<4H2I", tail[at + 4 : at + 20])
    if 0xFFFF in (here, count) or WIDE in (size, start):
        if at < 20 or tail[at - 20 : at - 16] != LOCATOR:
            raise Refused("a wide zip archive without its locator")
        file.seek(min(struct.unpack("<Q", tail[at - 12 : at - 4])[0], length))
        record = file.read(56)
        if len(record) < 56 or record[:4] != END_WIDE:
            raise Refused("a wide zip archive without its end")
        disk, first, here, count, size, start = struct.unpack("<2I4Q", record[16:56])
    if disk or first or here != count:
        raise Refused("a zip archive in several parts")
    return count, size, start


def entry(entries: bytes, at: int) -> tuple[str, Member, int]:
    """(name, member, where the next entry is) of one entry of the directory."""
    head = entries[at : at + 46]
    if len(head) < 46 or head[:4] != ENTRY:
        raise Refused("its zip directory is damaged")
    flags, method = struct.unpack("<2H", head[8:12])
    crc, packed, size = struct.unpack("<3I", head[16:28])
    name_length, extra_length, comment_length = struct.unpack("<3H", head[28:34])
    (header,) = struct.unpack("<I", head[42:46])
    middle = at + 46 + name_length
    try:
        name = entries[at + 46 : middle].decode()
    except UnicodeDecodeError as error:
        raise Refused("its zip archive has a name that is no text") from error
    size, packed, header = widened(entries[middle : middle + extra_length], (size, packed, header))
    if flags & 1 or method or size != packed:
        raise Refused(f"{name[:60]!r} is compressed or encrypted")
    return name, Member(header, size, crc), middle + extra_length + comment_length


def widened(extra: bytes, fields: tuple[int, ...]) -> tuple[int, ...]:
    """The fields, those that are WIDE taken in turn from the extra field number 1."""
    at = 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack("<2H", extra[at : at + 4])
        if tag == 1:
            body = extra[at + 4 : at + 4 + size]
            numbers = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            return tuple(next(numbers, WIDE) if field == WIDE else field for field in fields)
        at += 4 + size
    return fields


def data_start(file: BinaryIO, name: str, member: Member, length: int) -> int:
    """The offset of a member's first byte: behind its own header, whose padding only it knows."""
    file.seek(member.header)
    head = file.read(30)
    if len(head) < 30 or head[:4] != LOCAL:
        raise Refused(f"{name[:60]!r} has no header where the zip directory says")
    name_length, extra_length = struct.unpack("<2H", head[26:30])
    if file.read(name_length) != name.encode():
        raise Refused(f"{name[:60]!r} has another name in its own header")
    start = member.header + 30 + name_length + extra_length
    if start + member.size > length:
        raise Refused(f"{name[:60]!r} reaches beyond the end of the file")
    return start


def read_member(file: BinaryIO, name: str, member: Member, length: int, limit: int) -> bytes:
    """All bytes of a small member, if their checksum is right."""
    if member.size > limit:
        raise Refused(f"{name[:60]!r} has {member.size} bytes, wanted at most {limit}")
    file.seek(data_start(file, name, member, length))
    found = file.read(member.size)
    if zlib.crc32(found) != member.crc:
        raise Refused(f"{name[:60]!r} is damaged: its checksum is wrong")
    return found
