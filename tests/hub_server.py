"""The part of the Hugging Face Hub's protocol that pushing and pulling a model uses, on loopback and in memory."""
import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN, READ_ONLY_TOKEN = 'hf_writer', 'hf_reader'
LICENSES = ('apache-2.0', 'mit')


class Hub:
    """Repositories of the user 'someone': {name: {'private', 'revisions': {branch: (commit, {path: content})}}}."""

    def __init__(self):
        self.repos, self.objects, self.seen = {}, {}, []

    def commit(self, repo, branch, files):
        commit = hashlib.sha1(repr((repo, branch, len(self.seen), sorted(files))).encode()).hexdigest()
        self.repos[repo]['revisions'][branch] = (commit, files)
        return commit

    def find(self, repo, revision):
        for branch, (commit, files) in self.repos.get(repo, {'revisions': {}})['revisions'].items():
            if revision in (branch, commit):
                return commit, files
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def answer(self, status, content=None, headers=None, body=None):
        data = body if body is not None else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        common = {'Content-Type': 'application/json', 'Content-Length': str(len(data))}
        for key, value in {**common, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def refuse(self, status, code, message):
        self.answer(status, {'error': message}, {'X-Error-Code': code, 'X-Error-Message': message})

    @property
    def token(self):
        return self.headers.get('Authorization', '').removeprefix('Bearer ')

    def handle_any(self):
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        path = self.path.partition('?')[0]
        hub.seen.append((self.command, path))
        if self.command in ('POST', 'PUT') and not path.startswith('/upload/') and path != '/api/validate-yaml':
            if self.token not in (TOKEN, READ_ONLY_TOKEN):
                return self.refuse(401, 'Unauthorized', 'Invalid username or password.')
            if self.token == READ_ONLY_TOKEN:
                return self.refuse(403, 'Forbidden', 'This token has no write access.')
        routes = [
            (r'POST /api/repos/create', self.create), (r'POST /api/validate-yaml', self.validate_card),
            (r'GET /api/models/([^/]+/[^/]+)', self.info),
            (r'GET /api/models/([^/]+/[^/]+)/revision/(.+)', self.info),
            (r'POST /api/models/([^/]+/[^/]+)/branch/(.+)', self.branch),
            (r'POST /api/models/([^/]+/[^/]+)/preupload/(.+)', self.preupload),
            (r'POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch', self.batch), (r'PUT /upload/(\w+)', self.upload),
            (r'POST /api/models/([^/]+/[^/]+)/commit/(.+)', self.commit),
            (r'POST /([^/]+/[^/]+)\.git/info/lfs/verify', self.verify), (r'GET /storage/(\w+)', self.storage),
            (r'(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self.resolve),
        ]
        for pattern, method in routes:
            found = re.fullmatch(pattern, f'{self.command} {path}')
            if found:
                return method(body, *found.groups())
        return self.refuse(404, 'RepoNotFound', f'{self.command} {path} is unknown')

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body):
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if not repo.startswith('someone/'):
            return self.refuse(403, 'Forbidden', "You don't have the rights to create a model there")
        url = {'url': f'http://{self.headers["Host"]}/{repo}', 'name': repo, 'id': repo}
        if repo in self.server.hub.repos:
            return self.answer(409, {**url, 'error': 'You already created this model repo'})
        private = bool(wanted.get('private')) or wanted.get('visibility') == 'private'  # by release of the client
        self.server.hub.repos[repo] = {'private': private, 'revisions': {}}
        self.server.hub.commit(repo, 'main', {})
        return self.answer(200, url)

    def validate_card(self, body):
        _, metadata, _ = json.loads(body)['content'].split('---\n', 2)
        known = yaml.safe_load(metadata)['license'] in LICENSES
        errors = [] if known else [{'message': f'"license" must be one of {", ".join(LICENSES)}'}]
        return self.answer(200 if known else 400, {'errors': errors, 'warnings': []})

    def visible(self, repo):
        known = self.server.hub.repos.get(repo)
        return known is not None and (not known['private'] or self.token == TOKEN)

    def info(self, body, repo, revision='main'):
        if not self.visible(repo):
            return self.refuse(404 if self.token else 401, 'RepoNotFound', 'Repository not found')
        commit, files = self.server.hub.find(repo, revision)
        return self.answer(200, {'id': repo, 'modelId': repo, 'sha': commit, 'tags': [], 'downloads': 0, 'likes': 0,
                                 'private': self.server.hub.repos[repo]['private'],
                                 'siblings': [{'rfilename': name} for name in files]})

    def branch(self, body, repo, branch):
        if branch in self.server.hub.repos[repo]['revisions']:
            return self.answer(409, {'error': 'Reference already exists'})
        self.server.hub.commit(repo, branch, dict(self.server.hub.find(repo, 'main')[1]))
        return self.answer(200, {})

    def preupload(self, body, repo, revision):
        return self.answer(200, {'files': [
            {'path': file['path'], 'shouldIgnore': False, 'oid': None,
             'uploadMode': 'lfs' if file['path'].endswith('.safetensors') else 'regular'}
            for file in json.loads(body)['files']]})

    def batch(self, body, repo):
        return self.answer(200, {'transfer': 'basic', 'objects': [
            {**entry, 'actions': {
                'upload': {'href': f'http://{self.headers["Host"]}/upload/{entry["oid"]}'},
                'verify': {'href': f'http://{self.headers["Host"]}/{repo}.git/info/lfs/verify'}}}
            for entry in json.loads(body)['objects']]})

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, 'BadDigest', 'the content is not that of its digest')
        self.server.hub.objects[oid] = body
        return self.answer(200, {})

    def verify(self, body, repo):
        entry = json.loads(body)
        return self.answer(200 if len(self.server.hub.objects.get(entry['oid'], b'')) == entry['size'] else 404, {})

    def storage(self, body, oid):
        return self.answer(200, headers={'ETag': f'"{oid}"'}, body=self.server.hub.objects[oid])

    def commit(self, body, repo, revision):
        _, files = self.server.hub.find(repo, revision)
        files = dict(files)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif entry['key'] == 'lfsFile':
                files[value['path']] = self.server.hub.objects[value['oid']]
        commit = self.server.hub.commit(repo, revision, files)
        url = f'http://{self.headers["Host"]}/{repo}/commit/{commit}'
        return self.answer(200, {'success': True, 'commitOid': commit, 'commitUrl': url, 'hookOutput': ''})

    def resolve(self, body, repo, revision, name):
        if not self.visible(repo):
            return self.refuse(404 if self.token else 401, 'RepoNotFound', 'Repository not found')
        found = self.server.hub.find(repo, revision)
        if found is None:
            return self.refuse(404, 'RevisionNotFound', 'Invalid rev id')
        commit, files = found
        if name not in files:
            return self.answer(404, {}, {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit})
        if name.endswith('.safetensors'):  # large files lie on another host, which 'localhost' is to a client
            oid = hashlib.sha256(files[name]).hexdigest()
            self.server.hub.objects[oid] = files[name]
            return self.answer(302, headers={
                'Location': f'http://localhost:{self.server.server_port}/storage/{oid}', 'X-Repo-Commit': commit,
                'X-Linked-Etag': f'"{oid}"', 'X-Linked-Size': str(len(files[name]))}, body=b'')
        blob = hashlib.sha1(b'blob %d\0' % len(files[name]) + files[name]).hexdigest()
        return self.answer(200, headers={'ETag': f'"{blob}"', 'X-Repo-Commit': commit}, body=files[name])


@contextmanager
def hub_server():
    """A hub on loopback: (its address, its `Hub`)."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads, server.hub = True, Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}', server.hub
    finally:
        server.shutdown()
        server.server_close()
