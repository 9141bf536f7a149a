"""Buffers that lie inside another one, on OpenCL."""
from __future__ import annotations
import ctypes
from tinygrad.runtime import ops_cl
from tinygrad.runtime.autogen import opencl as cl

def offset(self, buf, size:int, offset:int):
  """`size` bytes of a buffer from `offset` on: a multiple of the device's alignment, mostly 128 to 512."""
  region = cl.cl_buffer_region(offset, size)
  return ops_cl.checked(cl.clCreateSubBuffer(buf, cl.CL_MEM_READ_WRITE, cl.CL_BUFFER_CREATE_TYPE_REGION,
                                             ctypes.byref(region), status := ctypes.c_int32()), status)

def install():
  """Gives tinygrad's OpenCL device what its other devices have. Without it a parameter is a slice of its flat buffer,
  whose place is written into each kernel that touches it, and a training step of the network with 32, 64 and 64
  channels has 373 kernels to compile instead of 242. A part is never released: there are as many as parameters. An
  `_offset` of CLAllocator would make this unnecessary.

  It is not scoped: a part is allocated where it is first used, and lives as long as its parameter. Nobody else is
  affected: tinygrad makes no such parts on OpenCL, because its own `_offset` raises an error there."""
  ops_cl.CLAllocator._offset = offset  # type: ignore[method-assign]
