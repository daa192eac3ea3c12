"""gptfast beside the engines that people use on CPUs, on one model, in turns: `make bench-peers`."""
