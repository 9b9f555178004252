"""Decodes old-style events and commands: what comes between msgspec's decoder and the service's own code.

msgspec makes the object and sets its envelope. An `__init__` of the service runs next and must not change the envelope,
so that is put back afterwards; then comes the payload. In Python this would cost more than the decoding.
"""

cimport cython
from cpython.dict cimport PyDict_Next, PyDict_SetItem, PyDict_Update
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_XDECREF, Py_XINCREF
from cpython.set cimport PySet_Contains

import msgspec

cdef extern from "Python.h":
    int PyObject_IS_GC(object o)
    int PyObject_GC_IsTracked(object o)
    void PyObject_GC_Track(object o)

from keven_core.kafka import errors

cdef extern from "structmember.h":
    ctypedef struct PyMemberDef:
        int type
        Py_ssize_t offset
    ctypedef struct PyMemberDescrObject:
        PyMemberDef *d_member
    int T_OBJECT_EX

cdef extern from "Python.h":
    int PyObject_GenericSetDict(object made, object attributes, void *context) except -1
    object new_object "PyBaseObject_Type.tp_new" (PyTypeObject *cls, object arguments, PyObject *keywords)

cdef enum:
    MAX_FIELDS = 32

cdef object unset = msgspec.UNSET


cdef class _Initializer:
    """Runs `__init__` and leaves the fields of the envelope as they were."""

    cdef object init
    cdef object make_details
    cdef Py_ssize_t offsets[MAX_FIELDS]
    cdef int count

    def __init__(self, cls, tuple fields not None, init, make_details):
        self.init = init
        self.make_details = make_details
        self.count = 0
        if len(fields) > MAX_FIELDS:
            raise errors.RegistrationError(f"{cls.__qualname__} has more than {MAX_FIELDS} fields beside its payload")
        for name in fields:
            descriptor = getattr(cls, name)
            if type(descriptor).__name__ != "member_descriptor" or (
                    <PyMemberDescrObject *><void *>descriptor).d_member.type != T_OBJECT_EX:
                raise errors.InternalError(f"{cls.__qualname__}.{name} is not kept where msgspec keeps fields")
            self.offsets[self.count] = (<PyMemberDescrObject *><void *>descriptor).d_member.offset
            self.count += 1

    cdef int run(self, object message) except -1:
        cdef PyObject *kept[MAX_FIELDS]
        cdef PyObject **place
        cdef PyObject *other
        cdef char *base = <char *><void *>message
        cdef int i
        for i in range(self.count):
            kept[i] = (<PyObject **>(base + self.offsets[i]))[0]
            Py_XINCREF(kept[i])
        try:
            if self.make_details is not None:
                message.details = self.make_details()
            self.init(message)
        finally:
            for i in range(self.count):
                place = <PyObject **>(base + self.offsets[i])
                other = place[0]
                place[0] = kept[i]
                Py_XDECREF(other)
        return 0


cdef bint is_flat(dict plain, frozenset names_to_look_at) except -1:
    """Whether attributes can be taken as they are: nothing in there stands for more than itself."""
    cdef PyObject *name
    cdef PyObject *value
    cdef Py_ssize_t position = 0
    while PyDict_Next(plain, &position, &name, &value):
        if type(<object>value) is dict or type(<object>value) is list or type(<object>name) is not str:
            return False
        if PySet_Contains(names_to_look_at, <object>name):
            return False
    return True


@cython.final
cdef class PayloadDecoder:
    """Of classes that write and read their payload themselves.

    Arguments:
        decode: msgspec's decoder of the class.
        initialize: (class, fields of the envelope, `__init__`, what makes the details that it may
            find, or None); None: nothing runs.
    """

    cdef object decode_message
    cdef _Initializer initializer

    def __init__(self, decode, initialize=None):
        self.decode_message = decode
        self.initializer = None if initialize is None else _Initializer(*initialize)

    def decode(self, data):
        """The message in a value. Raises what msgspec and the service raise."""
        message = self.decode_message(data)
        if self.initializer is not None:
            self.initializer.run(message)
        payload = message._wire_payload
        if payload is not unset:
            message._wire_payload = unset
            message.parse_payload(payload)
            return message
        payload = message._wire_payload_bytes
        if payload is not unset:
            message._wire_payload_bytes = unset
            message.parse_payload(payload)
        return message


@cython.final
cdef class DetailsDecoder:
    """Of pickled messages.

    Arguments:
        decode, initialize: as above.
        build: makes the details of plain data.
        detail_class: their class, if build() would do no more than set attributes of an object of it; None: it does.
        make: makes that object; None: an object without attributes will do.
        names_to_look_at: attributes that go by build() all the same.
    """

    cdef object decode_message, build, detail_class, make
    cdef bint is_simple
    cdef frozenset names_to_look_at
    cdef _Initializer initializer

    def __init__(self, decode, initialize=None, *, build, detail_class=None, make=None,
                 frozenset names_to_look_at not None=frozenset()):
        self.decode_message = decode
        self.initializer = None if initialize is None else _Initializer(*initialize)
        self.build = build
        self.names_to_look_at = names_to_look_at
        self.detail_class = detail_class
        self.make = make
        self.is_simple = detail_class is not None
        if self.is_simple and make is None and detail_class.__new__ is not object.__new__:
            raise errors.InternalError(f"{detail_class.__qualname__} has a __new__ of its own")

    def decode(self, data):
        """The message in a value. Raises what msgspec and the service raise."""
        message = self.decode_message(data)
        plain = message.details
        if self.initializer is not None:
            self.initializer.run(message)
        if self.is_simple and type(plain) is dict and is_flat(<dict>plain, self.names_to_look_at):
            if self.make is None:
                details = new_object(<PyTypeObject *><void *>self.detail_class, (), NULL)
                PyObject_GenericSetDict(details, plain, NULL)
            else:
                details = self.make()
                PyDict_Update(details.__dict__, plain)
            message.details = details
        elif plain is not unset:
            message.details = self.build(plain)
        elif self.initializer is None:
            message._begin()
        return message


@cython.final
cdef class AttributesDecoder:
    """Of classes whose own attributes are fields of the flat object.

    Arguments:
        decode, initialize: as above.
        known: attributes that the class tells of.
        slots: the fields of what `decode_known` gives, in the same order; UNSET: the attribute did not come.
        decode_known: decodes the known attributes, all others are left out.
        fill: (message, attributes, value or None): sets attributes that need a closer look, and those that `value` has
            beside the known ones.
        is_simple: whether known attributes can be taken as they are.
    """

    cdef object decode_message, decode_known, fill
    cdef tuple known, slots
    cdef bint is_simple
    cdef _Initializer initializer

    def __init__(self, decode, initialize=None, *, tuple known not None, tuple slots not None, decode_known, fill,
                 bint is_simple):
        self.decode_message = decode
        self.initializer = None if initialize is None else _Initializer(*initialize)
        self.known = known
        self.slots = slots
        self.decode_known = decode_known
        self.fill = fill
        self.is_simple = is_simple

    def decode(self, data):
        """The message in a value. Raises what msgspec and the service raise."""
        cdef dict attributes
        cdef bint flat = self.is_simple
        message = self.decode_message(data)
        found = self.decode_known(data)
        if self.initializer is not None:
            self.initializer.run(message)
        attributes = {}
        for i in range(len(self.slots)):
            value = getattr(found, <str>self.slots[i])
            if value is not unset:
                PyDict_SetItem(attributes, self.known[i], value)
                if type(value) is dict or type(value) is list:
                    flat = False
        if message._wire_attributes is not unset:
            self.fill(message, attributes, data)
        elif flat:
            message.__dict__.update(attributes)
        else:
            self.fill(message, attributes, None)
        # msgspec leaves what it has decoded untracked; from now on a service may make it part of a cycle.
        if PyObject_IS_GC(message) and not PyObject_GC_IsTracked(message):
            PyObject_GC_Track(message)
        return message
