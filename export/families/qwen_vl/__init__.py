"""All that is known about Qwen2-VL, Qwen2.5-VL and Qwen3-VL; `family` is what the outside is given."""
