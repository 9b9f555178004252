"""Declarations of context.pyx."""

cdef bint calibrated
cdef void *variables_of(object context) noexcept
cdef bint context_changed(object context, object base)
