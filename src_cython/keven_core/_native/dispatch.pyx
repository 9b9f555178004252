"""From the bytes of a value to its route: identify the event, look it up, decode it.

What is read here, before msgspec sees anything (the envelope is one flat object whose first field is its tag):

    JSON        ws* "{" ws* '"event_name"' ws* ":" ws* '"' name '"' ...
    MessagePack map-header fixstr(10)"event_name" str name ...

and the same with "command_name".

The first byte tells the two apart: MessagePack maps start at 0x80 and above, JSON below. A name with an escape, or an
envelope whose tag does not come first, takes the slow way: header, then a name-only msgspec decode.

A topic may have a codec beside them (keven_core.kafka.codecs): is_coded() says which values are its own, and
decode_by_codec() finds their route by the name that it reads.

Threads: a table is frozen when it is made and may be read from any thread that holds the GIL.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from keven_core._native.library cimport api
from rdkafka cimport rd_kafka_headers_t, rd_kafka_message_t

from keven_core.kafka import errors

cdef extern from *:
    """
    /* Upper bound of the nesting in a value: how many bytes could open a container. Plain loops, so that the compiler
       vectorizes them (about 0.05 ns a byte); the exact depth is computed only when the bound is over the limit. */
    static size_t keven_json_openers(const unsigned char *p, size_t n) {
        size_t count = 0;
        for (size_t i = 0; i < n; i++) count += (p[i] == '{') | (p[i] == '[');
        return count;
    }
    static size_t keven_msgpack_openers(const unsigned char *p, size_t n) {
        size_t count = 0;
        for (size_t i = 0; i < n; i++)
            count += ((unsigned char)(p[i] - 0x80) < 0x20) | ((unsigned char)(p[i] - 0xdc) < 4);
        return count;
    }
    """
    size_t keven_json_openers(const uint8_t *data, size_t size) nogil
    size_t keven_msgpack_openers(const uint8_t *data, size_t size) nogil


cdef enum:
    # msgspec recurses once per level, on the C stack of the consuming thread (512 KiB on macOS): 200 levels are far
    # beyond any real event and safe everywhere (msgspec#1033).
    MAX_DEPTH = 200
    # A value this short can't nest deeper than is safe, so it is not scanned.
    DEPTH_SCAN_FROM = 512
    # Kafka's limit for topic names, which event names become part of.
    MAX_NAME = 249


cdef inline uint64_t hash_name(const char *name, size_t size) noexcept nogil:
    # Eight bytes a step, multiply and fold: 3 ns for a name of 16 bytes. The table is built from the program's own
    # names and never grows from the wire, so it needs no seed against chosen collisions.
    cdef uint64_t h = 0x9E3779B97F4A7C15ULL ^ size
    cdef uint64_t word
    while size >= 8:
        memcpy(&word, name, 8)
        h = (h ^ word) * 0xFF51AFD7ED558CCDULL
        h ^= h >> 32
        name += 8
        size -= 8
    if size:
        word = 0
        memcpy(&word, name, size)
        h = (h ^ word) * 0xFF51AFD7ED558CCDULL
        h ^= h >> 32
    return h


cdef inline const char *skip_space(const char *p, const char *end) noexcept nogil:
    while p < end and (p[0] == 32 or p[0] == 10 or p[0] == 13 or p[0] == 9):
        p += 1
    return p


cdef inline bint is_plain(const char *name, size_t size) noexcept nogil:
    cdef size_t i
    for i in range(size):
        if name[i] == c'\\' or <uint8_t>name[i] < 0x20 or name[i] == 0x7f:
            return False
    return size > 0


cdef inline bint same(const char *a, const char *b, size_t size) noexcept nogil:
    """memcmp() == 0 for 8 to 16 bytes, without the call: a tag is looked for in every value."""
    cdef uint64_t word[4]
    memcpy(&word[0], a, 8)
    memcpy(&word[1], b, 8)
    memcpy(&word[2], a + size - 8, 8)
    memcpy(&word[3], b + size - 8, 8)
    return word[0] == word[1] and word[2] == word[3]


cdef bint find_name(const Tag *tag, const char *data, size_t size, const char **name, size_t *name_size) noexcept nogil:
    """Find the event name when it is the first field; false means: not there, or not plain enough to be sure."""
    cdef const char *p = data
    cdef const char *end = data + size
    cdef const char *quote
    cdef uint8_t first
    cdef size_t limit
    if size < tag.size + 4:
        return False
    first = <uint8_t>data[0]
    if first < 0x80:
        p = skip_space(p, end)
        if p == end or p[0] != c'{':
            return False
        p = skip_space(p + 1, end)
        if <size_t>(end - p) < tag.size + 2 or not same(p, tag.json, tag.size + 2):
            return False
        p = skip_space(p + tag.size + 2, end)
        if p == end or p[0] != c':':
            return False
        p = skip_space(p + 1, end)
        if p == end or p[0] != c'"':
            return False
        p += 1
        limit = <size_t>(end - p)
        if limit > MAX_NAME + 1:
            limit = MAX_NAME + 1
        quote = <const char *>memchr(p, c'"', limit)
        if quote == NULL:
            return False
        name_size[0] = <size_t>(quote - p)
        name[0] = p
        return is_plain(p, name_size[0])
    if first < 0x90:
        p += 1
    elif first == 0xde:
        p += 3
    elif first == 0xdf:
        p += 5
    else:
        return False
    if end - p < <Py_ssize_t>tag.size + 2 or not same(p, tag.msgpack, tag.size + 1):
        return False
    p += tag.size + 1
    first = <uint8_t>p[0]
    p += 1
    if first >= 0xa0 and first <= 0xbf:
        name_size[0] = first & 0x1f
    elif first == 0xd9 and p < end:
        name_size[0] = <uint8_t>p[0]
        p += 1
    else:
        return False
    if <size_t>(end - p) < name_size[0] or name_size[0] > MAX_NAME:
        return False
    name[0] = p
    return is_plain(p, name_size[0])


cdef inline bint begins_with_str(const uint8_t *p, size_t size) noexcept nogil:
    """Whether a value begins with a MessagePack map whose first key is a string."""
    cdef size_t i = 1
    if size < 2:
        return False
    if p[0] == 0xde:
        i = 3
    elif p[0] == 0xdf:
        i = 5
    elif p[0] <= 0x80 or p[0] > 0x8f:
        return False
    return i < size and (0xa0 <= p[i] <= 0xbf or 0xd9 <= p[i] <= 0xdb)


cdef bint json_too_deep(const uint8_t *p, size_t size) noexcept nogil:
    cdef size_t i = 0
    cdef int depth = 0
    cdef bint in_string = False
    while i < size:
        if in_string:
            if p[i] == c'\\':
                i += 1
            elif p[i] == c'"':
                in_string = False
        elif p[i] == c'"':
            in_string = True
        elif p[i] == c'{' or p[i] == c'[':
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif p[i] == c'}' or p[i] == c']':
            depth -= 1
        i += 1
    return False


cdef uint64_t big_endian(const uint8_t *p, int width) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(width):
        value = (value << 8) | p[i]
    return value


cdef bint msgpack_too_deep(const uint8_t *p, size_t size) noexcept nogil:
    """Walk MessagePack without decoding. Truncated or invalid data is not too deep: msgspec refuses it."""
    cdef uint64_t left[MAX_DEPTH + 1]  # elements still to come, per level
    cdef int depth = 0
    cdef size_t i = 0
    cdef uint64_t skip, children
    cdef uint8_t b
    left[0] = 1
    while True:
        while left[depth] == 0:
            if depth == 0:
                return False
            depth -= 1
        if i >= size:
            return False
        left[depth] -= 1
        b = p[i]
        i += 1
        skip = 0
        children = 0
        if b < 0x80 or b >= 0xe0 or (0xc0 <= b <= 0xc3):
            pass
        elif b < 0x90:
            children = 2 * <uint64_t>(b & 0x0f)
        elif b < 0xa0:
            children = b & 0x0f
        elif b < 0xc0:
            skip = b & 0x1f
        elif b <= 0xc6 or (0xd9 <= b <= 0xdb):  # bin, str
            children = 1 << ((b - 0xc4) if b <= 0xc6 else (b - 0xd9))
            if size - i < children:
                return False
            skip = children + big_endian(p + i, <int>children)
            children = 0
        elif b <= 0xc9:  # ext
            children = 1 << (b - 0xc7)
            if size - i < children:
                return False
            skip = children + 1 + big_endian(p + i, <int>children)
            children = 0
        elif b == 0xca or b == 0xce or b == 0xd2:
            skip = 4
        elif b == 0xcb or b == 0xcf or b == 0xd3:
            skip = 8
        elif b == 0xcc or b == 0xd0:
            skip = 1
        elif b == 0xcd or b == 0xd1:
            skip = 2
        elif b <= 0xd8:  # fixext
            skip = 1 + (1 << (b - 0xd4))
        else:  # array, map of 16 or 32 bits
            skip = 2 if b == 0xdc or b == 0xde else 4
            if size - i < skip:
                return False
            children = big_endian(p + i, <int>skip)
            if b >= 0xde:
                children *= 2
        if skip > size - i:
            return False
        i += skip
        if children:
            if depth == MAX_DEPTH:
                return True
            depth += 1
            left[depth] = children


cdef int check_depth(const uint8_t *p, size_t size) except -1:
    cdef bint too_deep = False
    if size > DEPTH_SCAN_FROM:
        with nogil:
            if p[0] < 0x80:
                if keven_json_openers(p, size) > MAX_DEPTH:
                    too_deep = json_too_deep(p, size)
            elif keven_msgpack_openers(p, size) > MAX_DEPTH:
                too_deep = msgpack_too_deep(p, size)
        if too_deep:
            raise errors.UndecodableError(f"the value is nested deeper than {MAX_DEPTH} levels")
    return 0


def check_nesting(bytes value not None):
    """Raise UndecodableError for JSON or MessagePack that is nested too deep for msgspec."""
    check_depth(<const uint8_t *>PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))


def check_name(str name):
    """Raise UndecodableError for an event name that can't be one: empty, too long, or with control characters."""
    if not name:
        raise errors.UndecodableError("the event name is empty")
    if len(name) > MAX_NAME:
        raise errors.UndecodableError(f"the event name is longer than {MAX_NAME} characters: {name[:40]!r}...")
    if any(c < " " or c == "\x7f" for c in name):
        raise errors.UndecodableError(f"the event name has control characters: {name!r}")


@cython.final
cdef class Route:
    """What happens to one kind of value.

    Arguments:
        name: the event name, or the topic for a foreign route.
        call: takes the decoded value; for an async route it returns the coroutine.
        decode_json, decode_msgpack: take the value as a buffer; may be the same function, ignored when `raw`.
        decode_envelope: takes what a codec has read: name, fields of the envelope, payload. None: no codec is heeded.
        on_tombstone: takes the Record of a null value; None: tombstones are skipped.
        is_async, tombstone_is_async: `call` or `on_tombstone` returns an awaitable that has to be awaited.
        raw: `call` gets the value as bytes.
        with_topic: `call` gets the topic as keyword argument `topic` too.
        copied: the decoders get the value as bytes of its own instead of a view of the message.
        batch_size: `call` takes a list of up to so many decoded values; 0: one value.
        batch_wait_ms: how long the first of a list waits for others.
    """

    def __init__(self, str name, call, *, decode_json=None, decode_msgpack=None,
                 decode_envelope=None, on_tombstone=None, bint is_async=False, bint tombstone_is_async=False,
                 bint raw=False, bint with_topic=False, bint copied=False, Py_ssize_t batch_size=0,
                 int batch_wait_ms=0):
        if not raw and (decode_json is None or decode_msgpack is None):
            raise errors.InternalError(f"the route {name!r} has no decoders")
        self.name = name
        self.call = call
        self.decode_json = decode_json
        self.decode_msgpack = decode_msgpack
        self.decode_envelope = decode_envelope
        self.on_tombstone = on_tombstone
        self.is_async = is_async
        self.tombstone_is_async = tombstone_is_async
        self.raw = raw
        self.with_topic = with_topic
        self.copied = copied
        self.batch_size = batch_size
        self.batch_wait_ms = batch_wait_ms
        self.name_bytes = name.encode()
        self.name_data = PyBytes_AS_STRING(self.name_bytes)
        self.name_size = PyBytes_GET_SIZE(self.name_bytes)

    def __repr__(self):
        return f"<Route {self.name}{' async' if self.is_async else ''}{' raw' if self.raw else ''}>"


@cython.final
cdef class DispatchTable:
    """The frozen table of a server: event name -> Route.

    Arguments:
        routes: Routes by event name.
        bound: Routes by topic, for topics that carry one event (`keven_events_<name>`) or a foreign type.
        everything: the Route of every message, without identification (a user's own runner).
        unnamed: the Route of events that have no Route of their own; None: they are skipped.
        name_field: the first field of the values, which names them: "event_name" or "command_name".
        name_json, name_msgpack: decoders that return the event name of a value or None, for the slow way.
        codec_of: gives the codec of a topic beside JSON and MessagePack, or None; asked once for each topic.
        names_codec: whether a header `content-type` means the codec of that type; see keven_core.kafka.codecs.
        max_payload_bytes: larger values are refused before they are decoded.
    """

    def __cinit__(self):
        self.last = NULL
        self.mask = 7
        self.slots = <Slot *>PyMem_Calloc(self.mask + 1, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError()
        self.routes = {}
        self.bound = {}
        self.codecs = {}
        self._set_tag("event_name")

    def __init__(self, routes=(), *, bound=None, Route everything=None, Route unnamed=None,
                 str name_field="event_name", name_json=None, name_msgpack=None, codec_of=None, names_codec=None,
                 size_t max_payload_bytes=16 << 20):
        cdef Route route
        cdef uint64_t capacity = 8
        cdef uint64_t h, i
        self._set_tag(name_field)
        self.routes = {}
        for entry in routes:
            if not isinstance(entry, Route):
                raise TypeError(f"a dispatch table takes Routes, not {type(entry).__name__}")
            self.routes[entry.name] = entry
        self.bound = dict(bound or {})
        self.everything = everything
        self.unnamed = unnamed
        self.name_json = name_json
        self.name_msgpack = name_msgpack
        self.codec_of = codec_of
        self.names_codec = names_codec
        self.codecs = {}
        self.max_payload_bytes = max_payload_bytes
        while capacity < 2 * <uint64_t>len(self.routes):
            capacity *= 2
        PyMem_Free(self.slots)
        self.last = NULL
        self.mask = capacity - 1
        self.slots = <Slot *>PyMem_Calloc(capacity, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError()
        for route in self.routes.values():
            h = hash_name(route.name_data, route.name_size)
            i = h & self.mask
            while self.slots[i].route != NULL:
                i = (i + 1) & self.mask
            self.slots[i].hash = h
            self.slots[i].route = <void *>route

    def __dealloc__(self):
        PyMem_Free(self.slots)

    cdef int _set_tag(self, str name_field) except -1:
        cdef bytes name = name_field.encode()
        cdef bytes quoted = b'"' + name + b'"'
        cdef bytes packed = bytes([0xa0 | len(name)]) + name
        if not 7 <= len(name) <= 14:
            raise errors.InternalError(f"the field {name!r} does not have 7 to 14 bytes, see same()")
        self.name_field = name_field
        self.tag.size = len(name)
        memcpy(self.tag.json, PyBytes_AS_STRING(quoted), len(quoted))
        memcpy(self.tag.msgpack, PyBytes_AS_STRING(packed), len(packed))
        return 0

    cdef const char *tag_name(self) noexcept:
        """The name of the header that names a value, as of the field."""
        return self.tag.msgpack + 1

    cdef void *find(self, const char *name, size_t size) noexcept:
        """The Route of a name, or NULL; borrowed."""
        cdef uint64_t h = hash_name(name, size)
        cdef uint64_t i = h & self.mask
        cdef Route route
        while self.slots[i].route != NULL:
            if self.slots[i].hash == h:
                route = <Route>self.slots[i].route
                if route.name_size == size and memcmp(route.name_data, name, size) == 0:
                    return self.slots[i].route
            i = (i + 1) & self.mask
        return NULL

    cdef void *peek(self, const char *data, size_t size, bint *named) noexcept:
        """The Route of a value whose first field is its name; `named` says whether a name was found at all."""
        cdef const char *name
        cdef size_t name_size
        cdef size_t begin
        cdef void *found
        # Events come in runs: a value that begins, up to the end of its name, as the one that matched last is of the
        # same event, whatever its codec and its spaces: no scan, no hash.
        if self.last != NULL and size > self.prefix_size and memcmp(data, self.prefix, self.prefix_size) == 0:
            named[0] = True
            return self.last
        if not find_name(&self.tag, data, size, &name, &name_size):
            named[0] = False
            return NULL
        named[0] = True
        found = self.find(name, name_size)
        # In JSON the closing quote belongs to it, or a longer name would match too; MessagePack has the length before.
        begin = <size_t>(name - data) + name_size + (1 if <uint8_t>data[0] < 0x80 else 0)
        if found != NULL and begin <= sizeof(self.prefix):
            memcpy(self.prefix, data, begin)
            self.prefix_size = begin
            self.last = found
        return found

    cdef Route identify(self, const char *data, size_t size, rd_kafka_message_t *message, object headers):
        """The slow way, for a value that peek() could not name. Returns None when nobody handles it.

        Raises UndecodableError. The name of a header alone is not enough: msgspec accepts a missing tag, so the value
        must carry it too (a value without a tag is refused unless its topic is bound to one event).
        """
        cdef rd_kafka_headers_t *native = NULL
        cdef const void *value = NULL
        cdef size_t value_size = 0
        cdef const char *start
        name = None
        if message != NULL:
            if api.message_headers(message, &native) == 0 and api.header_get_last(
                    native, self.tag_name(), &value, &value_size) == 0 and value != NULL and value_size <= MAX_NAME:
                name = (<const char *>value)[:value_size].decode("utf-8", "replace")
        elif headers:
            for key, text in headers:
                if key == self.name_field and text is not None and len(text) <= MAX_NAME:
                    name = text.decode("utf-8", "replace")
        if name is not None:
            check_name(name)
            if self.unnamed is None and name not in self.routes:
                return None
        if size == 0:
            raise errors.UndecodableError("the value is empty")
        self.check(data, size)
        decode_name = self.name_json if <uint8_t>data[0] < 0x80 else self.name_msgpack
        try:
            tag = decode_name(data[:size])
        except Exception as error:
            hint = ""
            start = skip_space(data, data + size)
            if (start == data + size or start[0] != c'{') and not begins_with_str(<const uint8_t *>data, size):
                hint = "; it is neither a JSON nor a MessagePack object, see register_codec() for other formats"
            raise errors.UndecodableError(f"the value can't be decoded: {error}{hint}") from error
        if tag is None:
            raise errors.UndecodableError(
                f"the value has no {self.name_field}, and its topic is not bound to one"
            )
        check_name(tag)
        return self.routes.get(tag, self.unnamed)

    cdef int check(self, const char *data, size_t size) except -1:
        """Refuse values that are too large or nested too deep, before msgspec sees them."""
        self.check_size(size)
        return check_depth(<const uint8_t *>data, size)

    cdef int check_size(self, size_t size) except -1:
        if size > self.max_payload_bytes:
            raise errors.UndecodableError(
                f"the value has {size} bytes, more than KEVEN_MAX_PAYLOAD_BYTES={self.max_payload_bytes}"
            )
        return 0

    cdef object decode(self, Route route, object value, const char *data):
        """Decode `value` (whose first byte is at `data`) for a route. Raises what msgspec raises."""
        if <uint8_t>data[0] < 0x80:
            return route.decode_json(value)
        return route.decode_msgpack(value)

    cdef object other_route(self, Route route, const char *data, size_t size):
        """What a value names itself, when decoding it for the event of its topic failed.

        Returns its Route, False when nobody handles that event, None when it names nothing else.
        """
        cdef bint named = False
        cdef void *found = self.peek(data, size, &named)
        if not named or found == <void *>route:
            return None
        if found != NULL:
            return <Route>found
        return self.unnamed if self.unnamed is not None else False

    cdef object codec_for(self, str topic):
        """The codec of a topic, or None; the table keeps it."""
        cdef Route route
        if self.codec_of is None or self.everything is not None:
            return None
        if topic is None:
            return self.codec_of(None)
        if topic not in self.codecs:
            route = self.bound.get(topic)
            foreign = route is not None and route.decode_envelope is None
            self.codecs[topic] = None if foreign else self.codec_of(topic)
        return self.codecs[topic]

    cdef bint is_coded(self, codec, const char *data, size_t size, rd_kafka_message_t *message, headers) except -1:
        """Whether a value is its topic's codec's own, rather than JSON or MessagePack.

        A value of the codec may begin like one of these; that is seen by whether the whole of it is one.
        """
        cdef rd_kafka_headers_t *native = NULL
        cdef const void *text = NULL
        cdef const char *start
        cdef const char *end = data + size
        cdef size_t text_size = 0
        cdef bint named = False
        content_type = None
        if size == 0:
            return False
        if (data[0] == c'{' or <uint8_t>data[0] >= 0x80) and not getattr(codec, "headers_first", False):
            # What begins with its name, as we write it, is nobody else's. So the usual value costs one comparison:
            # headers would cost 0.7 us, more than its decoding, where a record has any.
            self.peek(data, size, &named)
            if named:
                return False
        if message != NULL:
            if api.message_headers(message, &native) == 0 and api.header_get_last(
                    native, "content-type", &text, &text_size) == 0 and text != NULL:
                content_type = (<const char *>text)[:text_size]
        elif headers:
            for key, given in headers:
                if key == "content-type":
                    content_type = given
        if content_type is not None:
            said = self.names_codec(content_type, codec.content_type)
            if said is not None:
                return said
        if data[0] == c'{':
            return False
        if <uint8_t>data[0] >= 0x80:
            if not begins_with_str(<const uint8_t *>data, size):
                return True
            return not self._is_whole(self.name_msgpack, data, size)
        start = skip_space(data, end)
        return start == data or start == end or start[0] != c'{' or not self._is_whole(self.name_json, data, size)

    cdef bint _is_whole(self, decode_name, const char *data, size_t size) except -1:
        try:
            self.check(data, size)
            decode_name(data[:size])
        except MemoryError:
            raise
        except Exception:
            return False
        return True

    cdef object open_by_codec(self, codec, bytes value, Route bound):
        """(route, name, fields, payload) of a codec's value; None when nobody handles it. Raises UndecodableError.

        `bound` is the route of its topic, or None: a value without a name is of that.
        """
        self.check_size(PyBytes_GET_SIZE(value))
        try:
            name, fields, payload = codec.decode(value)
            if type(name) is not str or type(fields) is not dict or type(payload) is not bytes:
                raise TypeError("decode() has to return (str, dict, bytes)")
        except MemoryError:
            raise
        except Exception as error:
            raise errors.UndecodableError(f"{codec.name}: {type(error).__name__}: {error}") from error
        if not name:
            if bound is None:
                raise errors.UndecodableError(
                    f"{codec.name}: the value has no {self.name_field}, and its topic is not bound to one"
                )
            name = bound.name
        check_name(name)
        # The one that JSON takes on this topic, so that a batch handler gets both in one list, in their order.
        route = bound if bound is not None and bound.name == name else self.routes.get(name, self.unnamed)
        return None if route is None else (route, name, fields, payload)

    cdef object decode_by_codec(self, codec, bytes value, Route bound):
        """(route, decoded) of a codec's value; None when nobody handles it. Raises UndecodableError."""
        opened = self.open_by_codec(codec, value, bound)
        if opened is None:
            return None
        route, name, fields, payload = opened
        try:
            return route, (<Route>route).decode_envelope(name, fields, payload)
        except (MemoryError, errors.UndecodableError):
            raise
        except Exception as error:
            raise errors.UndecodableError(f"{codec.name}: {name}: {type(error).__name__}: {error}") from error

    def name_of(self, value, str topic, headers=None):
        """The event name of a value as far as it can be told without decoding it, for log lines; None if it can't."""
        cdef const char *name
        cdef size_t size
        cdef Route route = self.bound.get(topic)
        if isinstance(value, bytes):
            if find_name(&self.tag, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value), &name, &size):
                return name[:size].decode("utf-8", "replace")
            codec = self.codec_for(topic)
            if codec is not None and self.is_coded(
                    codec, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value), NULL, headers):
                try:
                    said = codec.decode(value)[0]
                    check_name(said)
                    return said
                except Exception:  # it is no name then, whatever the codec says
                    pass
        return route.name if route is not None else None

    def resolve(self, bytes value not None, str topic=None, headers=None):
        """Identify and decode a value outside a consumer: (route, decoded), or (None, None) when nobody handles it.

        For runners that are called directly and for tests. Raises UndecodableError.
        """
        cdef const char *data = PyBytes_AS_STRING(value)
        cdef size_t size = PyBytes_GET_SIZE(value)
        cdef bint named = False
        cdef void *found
        cdef Route route
        if self.everything is not None:
            return self.everything, value
        route = self.bound.get(topic) if topic is not None else None
        codec = self.codec_for(topic)
        if codec is not None and self.is_coded(codec, data, size, NULL, headers):
            coded = self.decode_by_codec(codec, value, route)
            return coded if coded is not None else (None, None)
        if route is None:
            found = self.peek(data, size, &named)
            if found != NULL:
                route = <Route>found
            elif named:
                route = self.unnamed
            else:
                route = self.identify(data, size, NULL, headers)
            if route is None:
                return None, None
        if route.raw:
            return route, value
        if size == 0:
            raise errors.UndecodableError("the value is empty")
        self.check(data, size)
        try:
            return route, self.decode(route, value, data)
        except Exception as error:
            if topic is not None and topic in self.bound:
                other = self.other_route(route, data, size)
                if other is not None:
                    return self.resolve(value, None, headers)
            raise errors.UndecodableError(f"{route.name}: {error}") from error
