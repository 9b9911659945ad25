#!/usr/bin/env bash
# What only a GPU can show, one command each, from the repository's root (PYTHON chooses the interpreter):
#   benchmark/gpu.sh verify    the CUDA tests
#   benchmark/gpu.sh speed     the ratios of the README's speed table; PEERS=folder with checkouts of cleanrl/ and leanrl/ adds them
#   benchmark/gpu.sh profile   where an iteration's time goes: TD3, AMS and PAVE
#   benchmark/gpu.sh learn     the trainings whose results go to benchmark/results/, 5 seeds side by side, one after the other
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
race() { "$python" benchmark/race.py --settle 2000 --steps "$1" "${@:2}"; }

case "${1:-}" in
  verify)
    "$python" -m pytest -q tests/test_cuda.py
    ;;
  speed)
    for script in td3 sac; do
      peers=()
      [ -z "${PEERS:-}" ] || peers=(
        "$PEERS/cleanrl/cleanrl/${script}_continuous_action.py --env-id HalfCheetah-v4 --learning-starts 256"
        "$PEERS/leanrl/leanrl/${script}_continuous_action_torchcompile.py --env-id HalfCheetah-v4 --learning-starts 256 --compile --cudagraphs"
      )
      race 5000 "baselines/$script.py --env-id HalfCheetah-v4" \
        "baselines/$script.py --env-id HalfCheetah-v4 --no-cuda-graph --compile off" "${peers[@]}"
    done
    race 3000 "baselines/td3.py --env-id dog-run --num-envs 8" "td3_ams.py --env-id dog-run"
    protocol="--env-id Walker2d-v5 --hidden-sizes 400 300 --activation silu --learning-rate 1e-3"
    race 5000 "baselines/td3.py $protocol" "td3_pave.py --env-id Walker2d-v5" \
      "baselines/td3.py $protocol --num-seeds 5" "td3_pave.py --env-id Walker2d-v5 --num-seeds 5"
    for seeds in 2 5 10 16; do
      race 3000 "baselines/td3.py --env-id Walker2d-v5" "baselines/td3.py --env-id Walker2d-v5 --num-seeds $seeds"
    done
    "$python" benchmark/pave_update.py --device cuda
    ;;
  profile)
    "$python" benchmark/loop_profile.py baselines/td3.py --env-id dog-run --num-envs 8
    "$python" benchmark/loop_profile.py td3_ams.py --env-id dog-run
    "$python" benchmark/loop_profile.py td3_pave.py --env-id Walker2d-v5
    ;;
  learn)
    train() { "$python" "$@" --num-seeds 5 --checkpoint-seconds 300; }
    train td3_ams.py --env-id quadruped-run --total-timesteps 500000
    train baselines/td3.py --env-id quadruped-run --total-timesteps 500000 --num-envs 8
    train td3_pave.py --env-id Walker2d-v5
    train baselines/td3.py --env-id Walker2d-v5 --hidden-sizes 400 300 --activation silu --learning-rate 1e-3 --learning-starts 10000
    "$python" td3_ams.py --env-id dog-run --checkpoint-seconds 300
    ;;
  *)
    sed -n '2,6p' "$0"
    exit 2
    ;;
esac
