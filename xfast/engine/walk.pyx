"""A QEMU migration stream from the front: over guest memory to the first device section.

The walker is fed with pieces of the stream, of any size from `NEEDED` on, and keeps none of them:
of each RAM page it looks at the 8 bytes in front. So it serves files, block devices and pipes,
and takes the same few bytes of memory whatever the guest has. It knows every record that comes
before the devices, and stops at what it does not know: a length can't be guessed.

*Source*: QEMU migration/savevm.c qemu_loadvm_state_main(); migration/ram.c ram_load_precopy(),
parse_ramblock_mapped_ram(); migration/block-dirty-bitmap.c dirty_bitmap_load_header().
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from xfast.engine.flat cimport flat

cdef extern from *:
    """
    #define be16(p) ((uint16_t)((p)[0] << 8 | (p)[1]))
    #define be32(p) ((uint32_t)be16(p) << 16 | be16((p) + 2))
    static inline uint64_t be64(const unsigned char *p)
    {
        uint64_t v;
        __builtin_memcpy(&v, p, 8);
        return __builtin_bswap64(v);
    }
    """
    uint16_t be16(const uint8_t *p) noexcept nogil
    uint32_t be32(const uint8_t *p) noexcept nogil
    uint64_t be64(const uint8_t *p) noexcept nogil

# What a record needs at most to be told (bytes); payloads are passed over
NEEDED = 2048

cdef enum:
    EOF_RECORD = 0x00
    SECTION_START = 0x01
    SECTION_PART = 0x02
    SECTION_END = 0x03
    SECTION_FULL = 0x04
    SUBSECTION = 0x05
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E

cdef enum:  # RAM_SAVE_FLAG_*
    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    HOOK = 0x80
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200

cdef enum:  # DIRTY_BITMAP_MIG_FLAG_*
    BITMAP_EOS = 0x01
    BITMAP_ZEROES = 0x02
    BITMAP_NAME = 0x04
    BITMAP_DEVICE = 0x08
    BITMAP_START = 0x10
    BITMAP_BITS = 0x40
    BITMAP_EXTRA = 0x80

cdef enum:
    OPEN_RETURN_PATH = 1
    PACKAGED = 8
    ENABLE_COLO = 10
    ENCODED = 1
    PAGE_SIZE = 4096
    COMPRESSED_LIMIT = 8192
    NAME_LIMIT = 1024
    CAPABILITIES_LIMIT = 256
    HEADER_LIMIT = 1 << 17

# Beyond any file: sums of an offset and a length stay below 2^64
cdef uint64_t FAR = <uint64_t>1 << 62


cdef class Walker:
    """Parse a stream that is pushed in piece by piece.

    Parameters
    ----------
    start : int
        Where the stream begins in its file: mapped-ram has offsets of the file.

    Attributes
    ----------
    position : int
        Offset of the next byte that is wanted.
    skip : int
        Bytes from there on that are payload: whoever can seek need not feed them.
    devices : int
        Offset of the first device section, -1 until it is there.
    early : bool
        No guest memory came before that section.
    head : int
        Bytes of the stream's header and its configuration record.
    return_path : bool
        The destination answers, and the source waits for its last word.
    last : bool
        The part that was entered last ends its section.
    ended : bool
        The stream came to its end without a device.
    trouble : tuple of (int, str, str) or None
        What stopped the walk: offset, found, expected.
    """

    def __init__(self, uint64_t start=0):
        self.start = self.position = start
        self.devices = -1
        self.state = HEADER

    @property
    def stopped(self):
        """Whether no more bytes are wanted."""
        return self.state == STOPPED

    cdef uint64_t under_way(self) noexcept:
        """Bytes that came of a part of guest memory that is not over; 0 between two."""
        return self.position - self.entered if self.state == RAM else 0

    def feed(self, data):
        """Parse what `data` holds from `position` on; return how many bytes of it are done.

        The rest (less than `NEEDED` bytes) has to come again, with what follows it. Where
        `stopped` turns true, the rest begins at what stopped the walk.
        """
        view = memoryview(data)
        cdef Py_buffer *given = flat(view, 1, 1, False)
        return self.over(<const uint8_t *>given.buf, given.len)

    cdef Py_ssize_t over(self, const uint8_t *p, Py_ssize_t n) except -1:
        cdef Py_ssize_t at = 0, step
        while self.state != STOPPED:
            if self.skip:
                step = n - at if <uint64_t>(n - at) < self.skip else <Py_ssize_t>self.skip
                self.skip -= step
                at += step
                self.position += step
                if self.skip:
                    break
            step = self.record(p + at, n - at)
            at += step
            self.position += step
            if not step and not self.skip:
                break
        return at

    def jump(self):
        """Leave the payload that `skip` tells of out; the next bytes are those behind it."""
        self.position += self.skip
        self.skip = 0

    cdef Py_ssize_t record(self, const uint8_t *p, Py_ssize_t n) except -1:
        """Pass over what begins at `p`, as far as it is whole; return the bytes done."""
        if self.state == RAM:
            return self.pages(p, n)
        if self.state == TOP:
            return self.top(p, n)
        if self.state == BLOCKS:
            return self.block(p, n)
        if self.state == BITMAPS:
            return self.bitmap(p, n)
        if self.state == HEADER:
            return self.header(p, n)
        if self.state == PARTS:
            return self.part(p, n)
        return self.capability(p, n)

    cdef Py_ssize_t stop(self, Py_ssize_t at, str found, str expected) except -1:
        self.state = STOPPED
        self.trouble = (self.position + at, found, expected)
        return 0

    cdef Py_ssize_t header(self, const uint8_t *p, Py_ssize_t n) except -1:
        """The magic, and the configuration record up to its subsections."""
        cdef uint32_t length
        if n < 9:
            return 0
        if be32(p) != 0x5145564D or be32(p + 4) != 3:
            return self.stop(0, "no QEMU stream", "QEVM and version 3")
        if p[8] != CONFIGURATION:
            self.state = TOP
            self.head = 8
            return 8
        if n < 13:
            return 0
        length = be32(p + 9)
        if length > NAME_LIMIT:
            return self.stop(9, f"a machine name of {length} bytes", f"at most {NAME_LIMIT}")
        if n < 13 + <Py_ssize_t>length:
            return 0
        self.state = PARTS
        return 13 + length

    cdef Py_ssize_t part(self, const uint8_t *p, Py_ssize_t n) except -1:
        """A subsection of the configuration record, or what follows the last one."""
        cdef Py_ssize_t length
        cdef bytes name
        if self.position - self.start > HEADER_LIMIT:
            return self.stop(0, "more of them", f"subsections within {HEADER_LIMIT} bytes")
        if n < 2:
            return 0
        if p[0] != SUBSECTION:
            self.head = self.position - self.start
            self.state = TOP
            return self.top(p, n)
        length = 2 + p[1] + 4
        if n < length + 4:
            return 0
        name = p[2:2 + p[1]]
        if name == b"configuration/target-page-bits":
            if be32(p + length) != 12:
                return self.stop(length, f"pages of 2^{be32(p + length)} bytes", "2^12")
            return length + 4
        if name == b"configuration/uuid":
            self.skip = 16
            return length
        if name == b"configuration/capabilities":
            self.capabilities = be32(p + length)
            if self.capabilities > CAPABILITIES_LIMIT:
                return self.stop(
                    length, f"{self.capabilities} capabilities", f"at most {CAPABILITIES_LIMIT}"
                )
            self.state = CAPABILITIES
            return length + 4
        return self.stop(
            0, f"the subsection {name.decode('ascii', 'replace')}", "a configuration known here"
        )

    cdef Py_ssize_t capability(self, const uint8_t *p, Py_ssize_t n) except -1:
        cdef bytes name
        if not self.capabilities:
            self.state = PARTS
            return self.part(p, n)
        if n < 1 or n < 1 + p[0]:
            return 0
        name = p[1:1 + p[0]]
        self.ignore_shared |= name == b"x-ignore-shared"
        self.mapped_ram |= name == b"mapped-ram"
        self.capabilities -= 1
        return 1 + p[0]

    cdef Py_ssize_t top(self, const uint8_t *p, Py_ssize_t n) except -1:
        """A record of the stream itself."""
        cdef uint32_t section
        cdef int i
        if n < 1:
            return 0
        if p[0] == EOF_RECORD:
            self.state = STOPPED
            self.ended = True
            return 0
        if n < 5:
            return 0
        section = be32(p + 1)
        if p[0] == SECTION_FULL:
            self.state = STOPPED
            self.devices = self.position
            self.early = not self.started
            return 0
        if p[0] == SECTION_START:
            return self.begin(p, n, section)
        if p[0] == SECTION_PART or p[0] == SECTION_END:
            for i in range(self.live):
                if self.ids[i] == section:
                    self.last = p[0] == SECTION_END
                    return self.enter(self.kinds[i], section, 5)
            return self.stop(0, f"section {section}", "one that was begun")
        if p[0] == FOOTER:
            if section != self.section:
                return self.stop(0, f"a footer of section {section}", f"one of {self.section}")
            return 5
        if p[0] == COMMAND:
            if be16(p + 1) in (PACKAGED, ENABLE_COLO):
                name = "postcopy" if be16(p + 1) == PACKAGED else "COLO"
                return self.stop(0, f"the command that begins {name}", "a stream of precopy")
            self.return_path |= be16(p + 1) == OPEN_RETURN_PATH
            self.skip = be16(p + 3)
            return 5
        return self.stop(0, f"a record of type {p[0]:#x}", "a section, a command or the end")

    cdef Py_ssize_t begin(self, const uint8_t *p, Py_ssize_t n, uint32_t section) except -1:
        """The header of a section that comes in parts: its name, instance and version."""
        cdef Py_ssize_t length
        cdef uint32_t version
        cdef bytes name
        if n < 6 or n < 6 + p[5] + 8:
            return 0
        length = 6 + p[5] + 8
        self.last = False
        name = p[6:6 + p[5]]
        version = be32(p + length - 4)
        if (name, version) == (b"ram", 4):
            self.kinds[self.live] = RAM_KIND
            self.started = True
        elif (name, version) == (b"dirty-bitmap", 1):
            self.kinds[self.live] = BITMAP_KIND
        else:
            return self.stop(
                0, f"the section {name.decode('latin-1')!a}, version {version}",
                "ram, version 4, or dirty-bitmap, version 1",
            )
        if self.live == LIVE_LIMIT - 1:
            return self.stop(0, f"over {LIVE_LIMIT} sections that come in parts", "fewer")
        self.ids[self.live] = section
        self.live += 1
        return self.enter(self.kinds[self.live - 1], section, length)

    cdef Py_ssize_t enter(self, Kind kind, uint32_t section, Py_ssize_t length) except -1:
        self.section = section
        self.entered = self.position
        self.state = RAM if kind == RAM_KIND else BITMAPS
        return length

    cdef Py_ssize_t pages(self, const uint8_t *p, Py_ssize_t n) except -1:
        """Records of guest memory, up to the section's end or what is not whole."""
        cdef Py_ssize_t at = 0, need
        cdef uint64_t word
        cdef uint32_t flags, length
        while n - at >= 8:
            word = be64(p + at)
            flags = word & (PAGE_SIZE - 1)
            if flags == (PAGE | CONTINUE):  # nearly all of them
                if n - at < 8 + PAGE_SIZE:
                    self.skip = PAGE_SIZE
                    return at + 8
                at += 8 + PAGE_SIZE
                continue
            need = 8
            if flags & (ZERO | PAGE | XBZRLE | COMPRESS_PAGE) and not flags & CONTINUE:
                if n - at < 9:
                    return at
                need += 1 + p[at + 8]
            flags &= ~CONTINUE
            if flags == ZERO:
                need += 1
            elif flags == XBZRLE:
                need += 3
            elif flags == COMPRESS_PAGE:
                need += 4
            if n - at < need:
                return at
            if flags == PAGE:
                self.skip = PAGE_SIZE
                return at + need
            if flags == XBZRLE:
                length = be16(p + at + need - 2)
                if p[at + need - 3] != ENCODED or length > PAGE_SIZE:
                    return self.stopped_at(
                        at, f"an xbzrle page of type {p[at + need - 3]} with {length} bytes",
                        f"type {ENCODED} with at most {PAGE_SIZE}",
                    )
                self.skip = length
                return at + need
            if flags == COMPRESS_PAGE:
                length = be32(p + at + need - 4)
                if length > COMPRESSED_LIMIT:
                    return self.stopped_at(
                        at, f"a compressed page of {length} bytes", f"at most {COMPRESSED_LIMIT}"
                    )
                self.skip = length
                return at + need
            at += need
            if flags == MEM_SIZE:
                self.total = word & ~<uint64_t>(PAGE_SIZE - 1)
                self.state = BLOCKS
                return at
            if flags == EOS:
                self.state = TOP
                return at
            if flags not in (ZERO, HOOK, MULTIFD_FLUSH):
                return self.stopped_at(
                    at - need, f"RAM flags {word & (PAGE_SIZE - 1):#x}", "flags known here"
                )
        return at

    cdef Py_ssize_t stopped_at(self, Py_ssize_t at, str found, str expected) except -1:
        self.stop(at, found, expected)
        return at

    cdef Py_ssize_t block(self, const uint8_t *p, Py_ssize_t n) except -1:
        """One RAM block of the list that sets out the guest's memory."""
        cdef Py_ssize_t at
        cdef uint64_t used, word, target
        if not self.total:
            self.state = RAM
            return self.pages(p, n)
        if n < 1 or n < 1 + p[0] + 8 + 8 * self.ignore_shared + (28 if self.mapped_ram else 8):
            return 0
        at = 1 + p[0]
        used = be64(p + at)
        at += 8
        if not p[0] or used > self.total:
            return self.stop(
                0, f"a RAM block of {used} bytes with a name of {p[0]}",
                f"a name, and at most {self.total} bytes",
            )
        self.total -= used
        word = be64(p + at)
        if self.ignore_shared:
            at += 8
        elif word and not word >> 56 and not word & (PAGE_SIZE - 1) and not self.mapped_ram:
            at += 8  # postcopy: the size of huge pages; no record begins so
        if self.mapped_ram:
            if be32(p + at) != 1:
                return self.stop(at, f"mapped-ram, version {be32(p + at)}", "version 1")
            target = be64(p + at + 20)
            at += 28
            if target > FAR or used > FAR or target + used < self.position + at:
                return self.stop(
                    at - 8, f"pages at {target}, {used} bytes of them",
                    f"them to end behind {self.position + at}",
                )
            self.skip = target + used - self.position - at
        return at

    cdef Py_ssize_t bitmap(self, const uint8_t *p, Py_ssize_t n) except -1:
        """One chunk of a dirty bitmap."""
        cdef Py_ssize_t at = 1
        cdef uint32_t flags
        cdef uint64_t length
        if n < 1:
            return 0
        flags = p[0]
        if flags & BITMAP_EXTRA:
            return self.stop(0, f"dirty-bitmap flags {flags:#x}", "flags known here")
        for flag in (BITMAP_DEVICE, BITMAP_NAME):
            if flags & flag:
                if n <= at or n < at + 1 + p[at]:
                    return 0
                at += 1 + p[at]
        if flags & BITMAP_START:
            at += 5
        elif flags & BITMAP_BITS:
            at += 12 if flags & BITMAP_ZEROES else 20
        if n < at:
            return 0
        if flags & BITMAP_BITS and not flags & BITMAP_ZEROES:
            length = be64(p + at - 8)
            if length > FAR:
                return self.stop(at - 8, f"a bitmap of {length} bytes", f"at most {FAR}")
            self.skip = length
        if flags & BITMAP_EOS:
            self.state = TOP
        return at
