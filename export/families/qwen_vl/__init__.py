"""All that is known about Qwen2-VL and Qwen2.5-VL; `family` is what the outside is given."""
