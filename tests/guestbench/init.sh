#!/bin/sh
# /init of the guest of `cargo xtask bench soft`. The kernel passes words of its command line that
# it does not know on as environment variables.
echo "bench: up"
export PATH=/bin
anemone-guest-bench "${BENCH_MILLIS:-1000}" "$BENCH_LOOPS"
poweroff -f
