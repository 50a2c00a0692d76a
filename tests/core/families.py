"""The model families that the suite tests one by one."""

FAMILIES = (
    "gpt2 llama qwen2 qwen3 mistral gemma2 gemma3_text opt gpt_neox phi3 bloom falcon olmoe granite"
).split()
