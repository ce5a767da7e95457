"""fp16 and bf16: where they overflow, and the repair."""
