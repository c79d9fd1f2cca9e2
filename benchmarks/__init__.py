"""Side-by-side measurements of the kernels and of what people use instead; see README.md."""
