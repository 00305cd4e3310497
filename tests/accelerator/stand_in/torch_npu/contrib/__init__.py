"""Of torch_npu's extras, the one that MindSpeed imports."""
