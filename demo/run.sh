#!/usr/bin/env bash
# Train a Diffusion Transformer on handwritten digits and sample from it, on a CPU, with the commands that a
# cluster runs at scale. Run it again to resume after an interruption; `make clean` removes its output.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN=runs/demo
NETWORK=classifier:demo/classifier.safetensors
export DS_ACCELERATOR=cpu RAY_DEDUP_LOGS=0
started=$SECONDS

step() { printf '\n\033[1m== %s\033[0m  (%d s)\n' "$1" $((SECONDS - started)); }
show() { printf '$ %s\n' "$*"; "$@"; }

step "1/6  Write 1,797 handwritten digits as PNG files in class folders"
show python demo/digits.py $RUN/images

step "2/6  Encode them to latents in WebDataset shards with Ray; compute the features of a reference"
show dit-scale encode --config encode_demo
show dit-scale latents verify $RUN/latents
show dit-scale evaluate --make-reference $RUN/digits.npz $RUN/images --crop 64 --network $NETWORK --cache $RUN/features

step "3/6  Train a DiT on the latents with DeepSpeed, on two processes; judge it on the way"
show deepspeed -q --num_gpus 2 --no_local_rank --module dit_scale.cli train demo \
    evaluate.every_steps=200 evaluate.images=160 evaluate.network=$NETWORK evaluate.reference=$RUN/digits.npz

step "4/6  Sample 500 images of ten classes with guidance, in 20 steps of SDE-DPM-Solver++"
show deepspeed -q --num_gpus 2 --no_local_rank --module dit_scale.cli sample $RUN/run \
    --images 500 --tile 125 --sampler dpmpp_2m_sde --spacing logsnr --steps 20 --guidance 1.5

step "5/6  Do they show the requested digits, and are they new? Ask a classifier of real digits"
show python demo/score.py $RUN/run/samples/samples.npz --at-least 0.95

step "6/6  The score card: distances between samples and real digits, with their whole protocol"
show deepspeed -q --num_gpus 2 --no_local_rank --module dit_scale.cli evaluate $RUN/run/samples \
    --reference $RUN/digits.npz --network $NETWORK --errors --cache $RUN/features

printf '\n\033[1mDone in %d s.\033[0m\n' $((SECONDS - started))
cat <<TEXT
  images           $RUN/run/samples/grid.png
  score card       $RUN/run/samples/metrics.json
  while training   $RUN/run/evaluations/
  run              $RUN/run  (config.yaml, metrics.jsonl, events.jsonl, checkpoints/)
  latents          $RUN/latents
next steps, for example:
  $(command -v dit-scale | sed "s|$PWD/||") report $RUN/run
  $(command -v dit-scale | sed "s|$PWD/||") sample $RUN/run --classes 3,7 --images 20 --guidance 4 --out $RUN/threes_and_sevens
  $(command -v dit-scale | sed "s|$PWD/||") train dit_xl2_256 --dry-run --world 8
TEXT
