"""A stand-in for the Hugging Face Hub: as much of its HTTP API as the real clients need, held in memory.

The clients read their environment when they are imported, so they belong into a process of their own:

    with Hub() as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path), check=True)
        assert "config.json" in hub.repos["model", "user/name"].files()
"""

import base64
import json
import os
import secrets
import threading
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".bin", ".parquet", ".safetensors")  # uploaded one by one before the commit, which holds the other files
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS).encode()


class HubError(Exception):
    """An answer that is no success: the clients choose an exception by its code. Without a status, no answer."""

    def __init__(self, status: int | None, code: str = "", message: str = "", sha: str = "", url: str = ""):
        self.status, self.content = status, {"error": message, "url": url}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": sha}


def oid_of(path: str, content: bytes) -> str:
    """What the clients know a file's content by."""
    return (sha256(content) if path.endswith(LFS) else sha1(b"blob %d\0" % len(content) + content)).hexdigest()


@dataclass
class Repo:
    """A repository. A commit is a whole tree of files; branches, and pull requests as refs/pr/N, name commits."""

    id: str
    url: str
    private: bool = False
    gated: bool = False  # everybody sees which files there are, the owner alone what is in them
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.sha(revision)]

    def info(self, revision: str) -> dict:
        about = {"id": self.id, "modelId": self.id, "private": self.private, "gated": self.gated, "tags": []}
        return about | {"sha": self.sha(revision), "siblings": [{"rfilename": path} for path in self.files(revision)]}

    def entries(self, revision: str) -> dict[str, dict]:
        files = self.files(revision)
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        return {path: {"type": "directory", "path": path, "size": 0, "oid": ""} for path in folders} | {
            path: {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content)}
            for path, content in files.items()
        }

    def tree(self, revision: str, folder: str, recursive: bool) -> list[dict]:
        entries, prefix = self.entries(revision), f"{folder}/" if folder else ""
        if folder and folder not in entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}", self.sha(revision))
        below = [path for path in sorted(entries) if path.startswith(prefix)]
        return [entries[path] for path in below if recursive or "/" not in path.removeprefix(prefix)]

    def resolve(self, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        sha = self.sha(revision)
        if path not in self.commits[sha]:
            raise HubError(404, "EntryNotFound", "Entry not found", sha)
        content = self.commits[sha][path]
        return content, {"ETag": f'"{oid_of(path, content)}"', "X-Repo-Commit": sha}


class Hub(ThreadingHTTPServer):
    """The server, up within `with Hub() as hub`. It knows `user` by the token hf_user and `other` by hf_other."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.users = {"hf_user": "user", "hf_other": "other"}
        self.repos: dict[tuple[str, str], Repo] = {}  # by type and id
        self.blobs: dict[str, bytes] = {}  # what came by LFS, by oid
        self.log: list[tuple[str, str]] = []
        self.failures: list[SimpleNamespace] = []
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def environment(self, home: Path, token: str = "hf_user") -> dict[str, str]:
        """This process's environment, but for clients that know no other Hub, cache or user."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        return {key: value for key, value in os.environ.items() if not key.startswith(foreign)} | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1",
        }

    def fail(self, request: str = "", nth: int = 1, status: int | None = 500, after: bool = False):
        """Fail once, at the `nth` request from now whose "METHOD /path" contains `request`.

        Without a status the server hangs up. `after`: the request takes effect first, only its answer is lost.
        """
        self.failures.append(SimpleNamespace(request=request, nth=nth, status=status, after=after))

    def due_failure(self, request: str) -> SimpleNamespace | None:
        counting = [failure for failure in self.failures if failure.request in request]
        for failure in counting:
            failure.nth -= 1
        return next((failure for failure in counting if failure.nth == 0), None)


class Handler(BaseHTTPRequestHandler):
    """A connection. Routes return what is sent as JSON or, for a file, its content and its headers."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def handle_request(self):
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.user = self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        with self.server.lock:  # one request after the other, as the log has them
            self.server.log.append((self.command, unquote(url.path)))
            failure = self.server.due_failure(" ".join(self.server.log[-1]))
            try:
                if failure and not failure.after:
                    raise HubError(failure.status)
                result = self.route(*map(unquote, url.path[1:].split("/")))  # a revision is one segment: refs%2Fpr%2F1
                if failure:
                    raise HubError(failure.status)
            except HubError as error:
                self.answer(error.status, error.content, error.headers)
            else:
                self.answer(200, *(result if isinstance(result, tuple) else (result, {})))

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def answer(self, status: int | None, content: bytes | dict | list, headers: dict[str, str]):
        if status is None:
            self.close_connection = True
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """`Hub.log` has it."""

    def route(self, *segments: str) -> dict | list | tuple:
        match self.command, *segments:
            case "GET", "api", "whoami-v2":
                self.check(self.user, "", "Invalid username or password.")
                return {"type": "user", "name": self.user, "orgs": []}
            case "POST", "api", "validate-yaml":
                return {"errors": [], "warnings": []}
            case "POST", "api", "repos", "create":
                return self.create_repo(**json.loads(self.body))
            case "PUT", "lfs", _:
                self.server.blobs[sha256(self.body).hexdigest()] = self.body  # nobody asks for half a file by its oid
                return {}
            case method, "api", "models" | "datasets" | "spaces" as types, owner, name, *action:
                return self.route_repo(self.repo(types[:-1], f"{owner}/{name}"), method, *action)
            case method, "datasets" | "spaces" as types, owner, name, *action:
                return self.route_repo(self.repo(types[:-1], f"{owner}/{name}"), method, *action)
            case method, owner, name, *action:
                return self.route_repo(self.repo("model", f"{owner}/{name}"), method, *action)
        raise HubError(404)

    def route_repo(self, repo: Repo, *action: str) -> dict | list | tuple:
        match action:
            case ("GET",):
                return repo.info("main")
            case "GET", "revision", revision:
                return repo.info(revision)
            case "GET", "tree", revision, *folder:
                return repo.tree(revision, "/".join(folder), self.query.get("recursive") == ["true"])
            case "GET" | "HEAD", "resolve", revision, *path:
                self.check(self.owns(repo.id) or not repo.gated, "GatedRepo", f"Access to {repo.id} is restricted.")
                return repo.resolve(revision, "/".join(path))
            case "POST", "paths-info", revision:
                paths, entries = parse_qs(self.body.decode())["paths"], repo.entries(revision)
                return [entries[path] for path in paths if path in entries]
            case "POST", "info", "lfs", "objects", "batch":
                return self.lfs_batch(**json.loads(self.body))
            case "POST", "branch", branch:
                return self.create_branch(repo, branch, **json.loads(self.body))
            case "POST", "preupload", revision:
                return self.preupload(repo, revision, **json.loads(self.body))
            case "POST", "commit", branch:
                return self.commit(repo, branch, [json.loads(line) for line in self.body.splitlines()])
        raise HubError(404)

    def check(self, allowed: object, code: str, message: str):
        if not allowed:
            raise HubError(403 if self.user else 401, code, message)

    def check_write(self, repo_id: str):
        allowed = self.user and "create_pr" in self.query or self.owns(repo_id)
        self.check(allowed, "", f"{self.user} may not write to {repo_id}.")

    def owns(self, repo_id: str) -> bool:
        return self.user == repo_id.split("/")[0]

    def repo(self, type: str, id: str) -> Repo:
        repo = self.server.repos.get((type, id.removesuffix(".git")))
        if repo is None or repo.private and not self.owns(id):  # who may not see it is told that there is none
            raise HubError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        return repo

    def create_repo(self, name: str, organization: str | None = None, type: str = "model", **options) -> dict:
        repo_id = f"{organization or self.user}/{name}"
        url = f"{self.server.url}/{'' if type == 'model' else f'{type}s/'}{repo_id}"
        self.check_write(repo_id)
        if (type, repo_id) in self.server.repos:
            raise HubError(409, message="You already created this repo.", url=url)
        self.server.repos[type, repo_id] = repo = Repo(repo_id, url, options.get("visibility") == "private")
        repo.commit("main", {".gitattributes": GITATTRIBUTES})
        return {"url": url}

    def create_branch(self, repo: Repo, branch: str, startingPoint: str = "main") -> dict:  # noqa: N803
        self.check_write(repo.id)
        if branch in repo.branches:
            raise HubError(409, message=f"Reference already exists: {branch}")
        repo.branches[branch] = repo.sha(startingPoint)
        return {}

    def preupload(self, repo: Repo, revision: str, files: list[dict], **options) -> dict:
        self.check_write(repo.id)
        entries = repo.entries(revision)
        for file in files:
            mode = "lfs" if file["path"].endswith(LFS) else "regular"
            file |= {"uploadMode": mode, "shouldIgnore": False, "oid": entries.get(file["path"], {}).get("oid")}
        return {"files": files}

    def lfs_batch(self, objects: list[dict], **options) -> dict:
        for blob in objects:
            if blob["oid"] not in self.server.blobs:
                blob["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{blob['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def commit(self, repo: Repo, branch: str, operations: list[dict]) -> dict:
        """All of the operations or, if one fails, none of them: the branch moves at the end."""
        self.check_write(repo.id)
        if branch not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files = dict(repo.files(branch))
        for operation in operations:
            self.apply(files, operation["key"], **operation["value"])
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        sha = repo.commit(f"refs/pr/{number}" if "create_pr" in self.query else branch, files)
        urls = {"commitUrl": f"{repo.url}/commit/{sha}", "pullRequestUrl": f"{repo.url}/discussions/{number}"}
        return {"commitOid": sha, **urls}

    def apply(self, files: dict[str, bytes], key: str, path: str = "", content: str = "", oid: str = "", **more):
        if key == "file":
            files[path] = base64.b64decode(content)
        elif key == "lfsFile" and oid in self.server.blobs:
            files[path] = self.server.blobs[oid]
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]
        elif key != "header":
            raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
