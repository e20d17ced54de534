#!/usr/bin/env bash
# From handwritten digits to pictures drawn by a Diffusion Transformer, on a CPU: the same commands, in
# small, that a cluster runs. Started again it goes on where it stopped; `make clean` starts afresh.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN=runs/demo
export DS_ACCELERATOR=cpu RAY_DEDUP_LOGS=0
began=$SECONDS

step() { printf '\n\033[1m== %s\033[0m  (%d s)\n' "$1" $((SECONDS - began)); }
show() { printf '$ %s\n' "$*"; "$@"; }

step "1/5  1,797 handwritten digits as PNG files in class folders"
show python demo/digits.py $RUN/images

step "2/5  a Ray job encodes them to latents in WebDataset shards"
show dit-scale encode --config encode_demo
show dit-scale latents verify $RUN/latents

step "3/5  DeepSpeed trains a DiT on them, on two processes"
show deepspeed -q --num_gpus 2 --no_local_rank --module dit_scale.cli train demo

step "4/5  500 guided samples, ten classes"
show deepspeed -q --num_gpus 2 --no_local_rank --module dit_scale.cli sample $RUN/run \
    --images 500 --batch 125 --steps 50 --guidance 1.5

step "5/5  would a classifier of real digits recognise them?"
show python demo/score.py $RUN/run/samples/samples.npz --at-least 0.95

printf '\n\033[1mDone in %d s.\033[0m\n' $((SECONDS - began))
cat <<TEXT
  the picture      $RUN/run/samples/grid.png
  the run          $RUN/run  (config.yaml, metrics.jsonl, events.jsonl, checkpoints/)
  the latents      $RUN/latents
next, for example:
  $(command -v dit-scale | sed "s|$PWD/||") sample $RUN/run --classes 3,7 --images 20 --guidance 4 --out $RUN/threes_and_sevens
  $(command -v dit-scale | sed "s|$PWD/||") train dit_xl2_256 --dry-run --world 8
TEXT
