"""Strides that the compiled kernels take."""

from __future__ import annotations

from torch import Tensor

from flamingo_kernels._cpp import layouts


def has_unit_stride(tensor: Tensor) -> bool:
    """Whether the values of the last dimension are adjacent in memory."""
    return tensor.ndim == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1


def unit_stride(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a contiguous copy if the values of a row are not adjacent.

    Autograd may hand in an expanded gradient, as that of a sum is.
    """
    return tensor if has_unit_stride(tensor) else tensor.contiguous()


def row_strides(tensor: Tensor) -> tuple[int, int, int] | None:
    """Describe the rows of the last dimension as (inner_rows, outer_stride, inner_stride).

    None if the rows need more than two strides, or if the values of a row are not adjacent.
    """
    channels = tensor.shape[-1]
    if tensor.is_contiguous():
        return 0, 0, channels
    if tensor.stride(-1) != 1 and channels > 1:
        return None
    levels: list[tuple[int, int]] = []  # (size, stride), outermost last
    leading = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    for size, stride in reversed(list(leading)):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    inner_rows, inner_stride = levels[0] if levels else (0, 0)
    return (inner_rows, levels[1][1], inner_stride) if len(levels) == 2 else (0, 0, inner_stride)


def has_simple_rows(tensor: Tensor) -> bool:
    """Whether :func:`row_strides` can describe the tensor."""
    return tensor.is_contiguous() or row_strides(tensor) is not None


def simple_rows(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a contiguous copy if :func:`row_strides` cannot describe it."""
    return tensor if has_simple_rows(tensor) else tensor.contiguous()


def packed_row_strides(name: str, tensor: Tensor) -> bytes:
    """Pack :func:`row_strides` for the native library.

    Raises
    ------
    ValueError
        They cannot describe the tensor called ``name``.
    """
    described = row_strides(tensor)
    if described is None:
        raise ValueError(
            "the cpp kernel reads a last stride of 1 and up to two strides of rows; "
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        )
    return layouts.pack_row_strides(described)


def packed_rows(name: str, tensor: Tensor) -> tuple[int, bytes]:
    """Return the address and the packed row strides of a tensor."""
    return tensor.data_ptr(), packed_row_strides(name, tensor)
