# Shared by ops/setup, ops/test, ops/bench, ops/demo and ops/rootfs; meant to be sourced by bash.
#
# Holds the places everything agrees on (cache, target directory, CRIU) and the small functions that more than one
# script needs. Sourcing it changes nothing on the machine.

TIDEPOOL_OPS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
TIDEPOOL_ROOT="$(dirname "$TIDEPOOL_OPS")"
export TIDEPOOL_OPS TIDEPOOL_ROOT

export TIDEPOOL_CACHE="${TIDEPOOL_CACHE:-$HOME/.cache/tidepool}"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$TIDEPOOL_CACHE/target}"
export TIDEPOOL_CRIU_DIR="$TIDEPOOL_CACHE/criu"
export TIDEPOOL_CRIU="${TIDEPOOL_CRIU:-$TIDEPOOL_CRIU_DIR/criu}"
export DEBIAN_FRONTEND=noninteractive

# Tools installed by rustup are not on the path of a fresh shell, nor are the system's on that of a non-login root.
case ":$PATH:" in *":$HOME/.cargo/bin:"*) ;; *) PATH="$HOME/.cargo/bin:$PATH" ;; esac
case ":$PATH:" in *":/usr/sbin:"*) ;; *) PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" ;; esac
export PATH

# Progress goes to stderr: stdout belongs to data.
say() { printf '%s\n' "$*" >&2; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# version_at_least HAVE WANT: compares dotted versions numerically.
version_at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# Prints the codename of the running distribution.
distro_codename() { (. /etc/os-release 2>/dev/null && printf '%s\n' "${VERSION_CODENAME:-}"); }

# Prints the address of the distribution mirror this machine's apt uses. Apt itself is asked, so that one-line and
# deb822 sources, options and disabled entries are all understood the way apt understands them.
apt_mirror() {
    local code mirror
    code="$(distro_codename)"
    [ -n "$code" ] || return 1
    mirror="$(apt-get update --print-uris 2>/dev/null |
        sed -n "s#^'\(https\?://.*\)/dists/$code/\(In\)\?Release'.*#\1#p" | head -n 1)"
    [ -n "$mirror" ] || return 1
    printf '%s\n' "$mirror"
}

# The keyring that signs the distribution's archives.
APT_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# apt_get ARGUMENT...: apt-get that asks nothing. Lists already on the machine are tried first; they are fetched when there
# are none or when they are too old.
apt_get() {
    local get=(apt-get -qq -y -o Acquire::Retries=5 -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root)
    if [ -n "$(find /var/lib/apt/lists -name '*Packages*' -print -quit 2>/dev/null)" ] && "${get[@]}" "$@"; then return 0; fi
    say "fetching the package lists"
    "${get[@]}" update >&2 || die "the package lists cannot be fetched: check this machine's apt sources and network"
    "${get[@]}" "$@"
}
