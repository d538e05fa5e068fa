"""Runs a HumanEval program, which a language model wrote, where it can do little harm. Linux only.

    passed(program, prompt, test, entry_point)  →  does test's check(entry_point) return?

Three processes. This one starts a *warden*, a fresh interpreter that executes no line of the model's. The
warden builds the room, and starts in it a *tenant*, another fresh interpreter, that runs the program. The
check runs in the warden; it sees not the tested function but a stand-in for it, that sends the arguments to
the tenant as JSON and returns what comes back: None, bool, int, float, str, list, tuple, set, frozenset and
dict, and nothing else (another class with an __eq__ of its own could claim to equal anything).

    pass mark       a random token. The warden reads it after the tenant has started, and writes it after
                    check returned; it never is in a process that runs the model's code, so that printing a
                    mark, os._exit(0), walking frames or reading memory gain nothing
    namespaces      of its own for network (only `lo`, down; looked at before the start), mounts, processes,
                    IPC; as root, or else in a user namespace of its own. Where that is not allowed: `Refused`
    files           a read-only root that holds the Python installation and the system's libraries alone; an
                    empty working directory; no file can be written, none of /home, /proc, /dev is there
    limits          CPU, wall time, address space, no file of a byte, no second process or thread, no core
    inheritance     no environment, no file descriptor but two pipes; stdin, stdout, stderr are /dev/null;
                    two sessions; root becomes nobody; no new privileges; it dies with its warden

Not protected against: a bug in the kernel that leads out of a namespace; reading what any user may read of
the Python installation and of /usr; heat (one core for `LIMITS`); side channels. A program that knows
the test by heart and returns its values passes, as everywhere. The data file (`prompt` and `test`) is
trusted: the warden executes it. Programs have the standard library only.
"""

import ctypes
import fcntl
import json
import os
import resource
import select
import socket
import struct
import sys
import time

NAMESPACES = 0x40000000 | 0x00020000 | 0x20000000 | 0x08000000     # CLONE_NEWNET, NEWNS, NEWPID, NEWIPC
NEW_USER = 0x10000000
NOBODY = 65534
ENDS = (198, 199)                               # the tenant's file descriptors: what it is asked, its answers
TREES = ("/usr", "/lib", "/lib32", "/lib64", "/nix")                # those that exist; and Python's own
KINDS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
MOST = 1 << 22                                                      # bytes of one message from the tenant
LIMITS = dict(cpu_s=10, wall_s=20.0, memory=1 << 30)


class Refused(OSError):
    """No program was run, because this machine does not let the room be built."""


def passed(program, prompt, test, entry_point, **limits):
    """True where `program` defines entry_point such that test's check(entry_point) returns.

    prompt: the problem's own text, whose imports and helpers the check may use. limits: `LIMITS`' names.
    Refused where the machine does not allow the isolation; then nothing of the program has run.
    """
    import secrets  # slow to import, and of no use to the warden and the tenant
    import signal
    import subprocess
    import tempfile
    limits, token = LIMITS | limits, secrets.token_hex(16)
    job = dict(limits, program=program, prompt=prompt, test=test, entry_point=entry_point,
               namespaces=NAMESPACES)
    with tempfile.TemporaryDirectory() as folder:
        warden = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__), "warden"], cwd=folder, env={},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            out, err = warden.communicate(json.dumps(job).encode() + b"\n" + token.encode() + b"\n",
                                          timeout=limits["wall_s"] + 20)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if warden.poll() is None:
                os.killpg(warden.pid, signal.SIGKILL)
                warden.communicate()
    if out.startswith(b"refused "):
        raise Refused(f"no program was run: {out[8:].decode()}")
    if out == b"failed" or out == token.encode():
        return out == token.encode()
    reason = err.decode(errors="replace").strip().rpartition("\n")[2]
    raise Refused(f"the sandbox itself failed: {reason or warden.returncode}")


def probe():
    """Refused where this machine does not let a program run in isolation."""
    if not passed("def one():\n    return 1\n", "", "def check(f):\n    assert f() == 1\n", "one"):
        raise Refused("the sandbox failed a program that is right; is the machine overloaded?")


# ------------------------------------------------------------------------------
# the warden
# ------------------------------------------------------------------------------

def warden():
    """Builds the room, starts the tenant, runs the check, and only then writes the token."""
    job = json.loads(sys.stdin.buffer.readline())
    result, sys.stdout = sys.stdout, sys.stderr                     # a check may print
    try:
        ask, answer, deadline = start_tenant(job)
    except OSError as error:
        result.write(f"refused {error.filename or 'isolation'}: {error.strerror}; HumanEval needs Linux "
                     "that allows network, mount, process and user namespaces, or root")
        return
    token = sys.stdin.readline().strip()

    def candidate(*args, **kwargs):
        """The tested function, seen from here."""
        send(ask, [pack(list(args)), pack(kwargs)])
        return unpack(json.loads(read_line(answer, MOST, deadline)))
    space = {"__name__": "check"}
    try:
        if read_line(answer, MOST, deadline) != b"loaded":
            raise ValueError("the program did not run to its end")
        exec(job["prompt"], space)
        exec(job["test"], space)
        space[job["entry_point"]] = candidate
        space["check"](candidate)
    except Exception:                           # whatever the check or the tenant does wrong
        token = "failed"
    result.write(token)


def start_tenant(job):
    """(fd to ask, fd of answers, deadline) of a tenant that said it is alone; OSError where it can not be."""
    source = open(os.path.abspath(__file__), encoding="utf-8").read()
    python = os.path.realpath(sys.executable)
    null = os.open(os.devnull, os.O_RDWR)
    build_room(job["namespaces"])
    (ask_read, ask), (answer, answer_write) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()                                                 # kill(0, …) would reach the warden
            call("prctl", 1, 9, 0, 0, 0)                                # dies with it
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.dup2(ask_read, ENDS[0]), os.dup2(answer_write, ENDS[1])
            hard = dict(AS=job["memory"], CPU=job["cpu_s"], FSIZE=0, NPROC=0, NOFILE=256, CORE=0)
            for name, value in hard.items():
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
            os.execve(python, [python, "-I", "-S", "-B", "-c", source, "tenant"], {})
        finally:
            os._exit(1)
    os.close(ask_read), os.close(answer_write)
    deadline = time.monotonic() + job["wall_s"]
    try:
        ready = read_line(answer, MOST, deadline)
    except ValueError:
        ready = b"Python does not start there"
    if ready != b"ready":
        raise OSError(1, ready.decode(errors="replace"), python)
    send(ask, [job["program"], job["entry_point"]])
    return ask, answer, deadline


def build_room(namespaces):
    """Puts this process into namespaces and a read-only root of its own, as nobody; OSError if it can not."""
    room = os.getcwd()
    os.umask(0o022)
    try:
        call("unshare", namespaces)
    except PermissionError:                     # no root, or one without the capability
        unshare_as_user(namespaces | NEW_USER)
    call("mount", None, b"/", None, 1 << 14 | 1 << 18, None)            # MS_REC | MS_PRIVATE
    call("mount", b"none", room.encode(), b"tmpfs", 0, b"mode=755,size=64k")
    os.mkdir(f"{room}/empty")
    for tree in dict.fromkeys([*TREES, sys.base_prefix]):
        if os.path.islink(tree):
            os.symlink(os.readlink(tree), room + tree)
        elif os.path.isdir(tree):
            os.makedirs(room + tree, exist_ok=True)
            if not os.listdir(room + tree):                             # inside a tree that is there already
                call("mount", tree.encode(), (room + tree).encode(), None, 1 << 12 | 1 << 14, None)
    read_only = struct.pack("4Q", 1, 0, 0, 0)                           # mount_setattr: MOUNT_ATTR_RDONLY
    call("syscall", 442, -100, room.encode(), 0x8000, read_only, len(read_only))
    os.chroot(room)
    os.chdir("/empty")
    become_nobody()
    call("prctl", 38, 1, 0, 0, 0)                                       # PR_SET_NO_NEW_PRIVS


def unshare_as_user(namespaces):
    """Namespaces inside a user namespace, where this user is called nobody."""
    become_nobody()
    call("prctl", 4, 1, 0, 0, 0)                                        # PR_SET_DUMPABLE: /proc/self is ours
    user, group = os.geteuid(), os.getegid()
    call("unshare", namespaces)
    for name, text in dict(setgroups="deny", uid_map=f"{NOBODY} {user} 1",
                           gid_map=f"{NOBODY} {group} 1").items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def become_nobody():
    """From root to a user who owns nothing; there is no way back."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def call(name, *args):
    """A function of the C library; OSError with its name where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


# ------------------------------------------------------------------------------
# the tenant
# ------------------------------------------------------------------------------

def tenant():
    """Says that it is alone, runs the program, then answers calls of its function until it is killed."""
    ask, answer = ENDS
    os.environ.clear()                          # LC_CTYPE, which Python itself has set
    os.write(answer, (trouble() or "ready").encode() + b"\n")
    program, entry_point = json.loads(read_line(ask, sys.maxsize))
    space = {"__name__": "program"}
    exec(program, space)
    os.write(answer, b"loaded\n")
    while True:
        args, kwargs = json.loads(read_line(ask, sys.maxsize))
        value = space[entry_point](*unpack(args), **unpack(kwargs))
        send(answer, pack(value))


def trouble():
    """What is not as it must be in here, "" if nothing: more than a `lo` that is down, root, a file."""
    names = [name for _, name in socket.if_nameindex()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        flags = struct.unpack("16xH14x", fcntl.ioctl(handle, 0x8913, struct.pack("16s16x", b"lo")))[0]
    if names != ["lo"] or flags & 1:
        return f"the network has {', '.join(names)}"
    read_only = os.statvfs("/").f_flag & os.statvfs(os.__file__).f_flag & os.ST_RDONLY
    if os.getuid() == 0 or os.listdir(".") or not read_only:
        return "it is root, or its files are not as they should be"
    return ""


# ------------------------------------------------------------------------------
# between the two
# ------------------------------------------------------------------------------

def send(fd, message):
    """Writes a line of JSON."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(fd, data):]


def read_line(fd, most, deadline=None):
    """One line, without its newline; ValueError at the end of the stream, `most` bytes or the deadline."""
    data = bytearray()
    while True:
        if deadline is not None and not select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
            raise ValueError("too slow")
        piece = os.read(fd, 65536)
        data += piece
        if not piece or len(data) > most:
            raise ValueError("no whole line")
        if data.endswith(b"\n"):
            return bytes(data[:-1])


def pack(value):
    """A value as JSON that keeps tuples, sets and keys apart; TypeError for any other class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {"dict": [[pack(k), pack(v)] for k, v in value.items()]}
    kind = next((name for name, kind in KINDS.items() if isinstance(value, kind)), None)
    if kind is None:
        raise TypeError(f"{type(value).__name__} is not a plain value")
    return {kind: [pack(item) for item in value]}


def unpack(value):
    """What `pack` packed."""
    if not isinstance(value, dict):
        return value
    (kind, items), = value.items()
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in items}
    return KINDS[kind](unpack(item) for item in items)


if __name__ == "__main__":
    {"warden": warden, "tenant": tenant}[sys.argv[1]]()
