#!/usr/bin/env bash
# Makes .venv, the environment that every `make` verb runs in:
#
#     make setup          (every other verb calls it by itself, once)
#
# 1. finds the system libraries that FFCV's build and OpenCV need, and installs missing ones with apt;
# 2. makes .venv and installs requirements.lock in it;
# 3. tries what was installed, and only then writes .venv/.ready: a half-made .venv never passes for a whole one.
#
# Run again, it does nothing until requirements.lock or this file change.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PATH:/usr/sbin:/sbin"     # ldconfig, for users whose PATH lacks it
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

venv=.venv
ready=$venv/.ready                      # written last; holds the checksum of what was set up
ours=$venv/.made-by-setup               # written first; a .venv made by hand lacks it and is never deleted
log=$venv/setup.log
disk_gb=8                               # what .venv takes, roughly, with pip's temporary files

say()  { printf '%s\n' "$*"; }
stop() { printf 'setup: %s\n' "$*" >&2; exit 1; }

took() {  # seconds -> "1 min 12 s"
    if (($1 < 60)); then printf '%d s' "$1"; else printf '%d min %d s' $(($1 / 60)) $(($1 % 60)); fi
}

# step TEXT COMMAND...: runs the command with its output in the log; on a terminal, shows the log's last line meanwhile.
pulse=
step() {
    local text=$1 begun=$SECONDS status=0
    shift
    printf '\n### %s\n' "$text" >>"$log"
    if [[ -t 1 ]]; then
        (
            trap 'exit 0' TERM
            columns=$(tput cols 2>/dev/null || echo 80)
            while sleep 1; do
                line="  $text ... $(took $((SECONDS - begun)))  $(tail -n 20 "$log" | grep -v WARNING | tail -n 1)"
                printf '\r%s\033[K' "${line:0:columns-1}"
            done
        ) &
        pulse=$!
    else
        printf '  %s ...' "$text"
    fi
    "$@" >>"$log" 2>&1 </dev/null || status=$?
    if [[ -n $pulse ]]; then
        kill "$pulse" 2>/dev/null || true
        wait "$pulse" 2>/dev/null || true
        pulse=
        printf '\r\033[K  %s ...' "$text"
    fi
    if ((status)); then
        printf ' failed after %s\n' "$(took $((SECONDS - begun)))"
        return "$status"
    fi
    printf ' %s\n' "$(took $((SECONDS - begun)))"
}

# failed WHAT [HINT]: the end of the log and what to do.
failed() {
    local hint=${2:-}
    if [[ -z $hint ]]; then
        if grep -qiE 'no space left|disk quota' "$log"; then
            hint="the disk is full: free about $disk_gb GB (also where TMPDIR points)"
        elif grep -qiE 'name resolution|resolve host|connection (refused|timed out|broken)|failed to establish|read timed out|from versions: none' "$log"; then
            hint="the package index was not reached: see that there is a network, and pip's settings (pip config list)"
        elif grep -qiE 'hash.*mismatch|404 +not found' "$log"; then
            hint="the package lists are out of date: apt-get update"
        else
            hint="see the whole log"
        fi
    fi
    {
        printf '\n--- the last lines of %s ---\n' "$PWD/$log"
        tail -n 25 "$log"
        printf -- '---\nsetup: %s. What to do: %s; then `make setup` again.\n' "$1" "$hint"
    } >&2
    exit 1
}

interrupted() {
    trap - INT TERM HUP
    [[ -z $pulse ]] || kill "$pulse" 2>/dev/null || true
    printf '\nsetup: interrupted; the next `make` does it again.\n' >&2
    sleep 0.2  # make stumbles over a child that ends in the very moment of the signal
    exit 130
}
trap interrupted INT TERM HUP

# One set-up at a time in this folder; a second waits, then finds the first one's work.
if command -v flock >/dev/null; then
    exec 9<.
    flock -n 9 || { say "Another set-up is at work in this folder; waiting for it."; flock 9; }
fi

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
# Not only that a python is there: without its pyvenv.cfg, .venv/bin/python is the system's, and pip would install into that.
is_whole() {
    "$venv/bin/python" -c 'import os, sys
sys.exit(not (sys.version_info >= (3, 11) and sys.prefix != sys.base_prefix and os.path.samefile(sys.prefix, sys.argv[1])))' \
        "$venv" 2>/dev/null
}

checksum=$(cat requirements.lock setup.sh | cksum)
if [[ -f $ready ]] && is_whole && [[ $(cat "$ready") == "$checksum" ]]; then
    touch "$ready"
    exit 0
fi

# ---------------------------------------------------------------- what the machine has

[[ $(uname -s) == Linux ]] || stop "the pinned packages are for Linux; elsewhere install setup.cfg's yourself and use 'make PYTHON=/path/to/python ...'"
[[ $(uname -m) == x86_64 ]] || say "Note: the pinned packages were tried on x86-64 only, not on $(uname -m)."

if [[ -e $venv && ! -e $ours ]]; then
    found="made by hand"                # brought to the pinned versions, never deleted
    is_whole ||
        stop "$venv is there but is no working virtual environment of Python >= 3.11, and was not made by this set-up: move it away, then 'make setup' again"
    python=$venv/bin/python
elif [[ -e $ready ]] && is_whole; then
    found="of another lock"             # brought to this one
    python=$venv/bin/python
else
    found=                              # nothing, or what an interrupted set-up left
    python=
    for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            python=$(command -v "$candidate")
            break
        fi
    done
    [[ -n $python ]] ||
        stop "Python 3.11 or newer is needed, and python3 is $(version_of python3 || echo missing): install one (python3.11 ... python3.13 are looked for), or name one that has the packages: make PYTHON=/path/to/python ..."
fi

packages=()  # Debian's and Ubuntu's names
things=()    # the same for people
need() { packages+=("$1"); things+=("$2"); }
has_library() { ldconfig -p 2>/dev/null | grep -qF "$1 "; }
has_module() { command -v pkg-config >/dev/null && pkg-config --exists "$1"; }

command -v g++ >/dev/null         || need g++ "a C++ compiler (g++)"
command -v pkg-config >/dev/null  || need pkg-config "pkg-config"
has_module opencv4                || need libopencv-dev "OpenCV 4 with its headers"
has_module libturbojpeg           || need libturbojpeg0-dev "TurboJPEG with its headers"
has_library libGL.so.1            || need libgl1 "libGL.so.1"
has_library libgthread-2.0.so.0   || need libglib2.0-0 "GLib 2 (libgthread-2.0.so.0)"

version=$(version_of "$python")
lacks=()
"$python" -c 'import venv, ensurepip' 2>/dev/null || [[ $python == "$venv"/* ]] || lacks+=(venv)
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || lacks+=(dev)
for part in ${lacks[@]+"${lacks[@]}"}; do
    case $("$python" -c 'import sys; print(sys.base_prefix)') in
        /usr) need "python$version-$part" "Python $version's $part files" ;;
        *) stop "$python comes without its $([[ $part == venv ]] && echo 'venv and ensurepip modules' || echo 'C headers (Python.h)'): put a whole Python >= 3.11 first in PATH" ;;
    esac
done

# ---------------------------------------------------------------- how missing system packages get in

as_root=()
if ((${#packages[@]})); then
    listed=$(printf ', %s' "${things[@]}")
    listed=${listed:2}
    if ! command -v apt-get >/dev/null; then
        stop "this system lacks: $listed. Install them with its package manager (Debian's names: ${packages[*]}), then 'make setup' again"
    fi
    by_hand() {
        {
            say "setup: this system lacks: $listed."
            say "Installing them takes root, which this account does not have here. Type (or have typed):"
            say
            say "    sudo apt-get update"
            say "    sudo apt-get install --no-install-recommends ${packages[*]}"
            say
            say "then the same make command again."
        } >&2
        exit 1
    }
    if (($(id -u) != 0)); then
        command -v sudo >/dev/null || by_hand
        if ! sudo -n true 2>/dev/null; then
            { [[ -t 0 ]] && [[ -t 2 ]]; } || by_hand
            say "Missing from this system: $listed. Installing them takes root:"
            sudo -v || by_hand
        fi
        as_root=(sudo -n)
    fi
fi

# ---------------------------------------------------------------- the work

begun=$SECONDS
rm -f "$ready"
if [[ -n $found ]]; then
    say "Bringing .venv ($found) to the pinned versions (log: $log)"
else
    say "Setting up .venv with Python $version, once; minutes, most of them downloading (log: $log)"
    mkdir -p "$venv" && : >"$ours" || stop "cannot write in $PWD/$venv"
    find "$venv/" -mindepth 1 ! -path "$ours" -delete
    free_gb=$(($(df -Pk "$venv" | awk 'NR == 2 {print $4}') / 1048576))
    ((free_gb >= disk_gb)) || stop "$PWD has $free_gb GB free; .venv takes about $disk_gb"
fi
: >"$log"

if ((${#packages[@]})); then
    # A fresh machine often holds apt's lock for its own updates: wait for it. A list that cannot be fetched
    # (someone else's repository) need not matter.
    apt=(${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a apt-get -y -o DPkg::Lock::Timeout=300)
    step "Reading the system's package lists" "${apt[@]}" update || true
    step "Installing ${packages[*]}" "${apt[@]}" install --no-install-recommends "${packages[@]}" ||
        failed "the system packages could not be installed" "$(
            (($(id -u) == 0)) && sudo= || sudo="sudo "
            echo "see what apt says; by hand it is: ${sudo}apt-get install --no-install-recommends ${packages[*]}")"
fi

if [[ $python != "$venv"/* ]]; then
    step "Making .venv" "$python" -m venv "$venv" || failed "python -m venv failed" "try another Python >= 3.11"
fi
is_whole || failed "$venv is not a working virtual environment" "'rm -r .venv' starts afresh"
count=$(grep -c '^[^# ]*==' requirements.lock)
step "Installing $count pinned packages" \
    "$venv/bin/python" -m pip install --progress-bar off --no-compile -r requirements.lock ||
    failed "the pinned packages could not be installed"
# In parallel, which pip does not do. Tests that try newer syntax do not compile, and need not.
compile_all() { "$venv/bin/python" -m compileall -q -j 0 -x '/(tests?|pip|setuptools|mypy)/|/testing/_internal/' "$venv/lib" || true; }
step "Compiling them to bytecode" compile_all

try='
import importlib, sys
wrong = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as why:
        wrong.append(f"{name}: {type(why).__name__}: {why}")
sys.exit("\n".join(wrong) or 0)
'
modules=(torch torchvision numba PIL cv2 ffcv timm safetensors jsonargparse tensorboard onnx onnxscript onnxruntime pytest)
[[ $(uname -m) != x86_64 ]] || modules+=(nvidia.dali)
step "Trying them" "$venv/bin/python" -P -c "$try" "${modules[@]}" ||
    failed "installed, but not all of it can be imported" "see the message; 'rm -r .venv' starts afresh"

printf '%s\n' "$checksum" >"$ready.new"
mv "$ready.new" "$ready"
say "Ready after $(took $((SECONDS - begun)))."
