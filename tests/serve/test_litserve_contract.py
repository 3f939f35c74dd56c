"""LitServe's undocumented names that the package uses exist, and behave as it needs (pinned version 0.2.19)."""

import inspect

import litserve
import pytest
from litserve.specs.base import LitSpec


class StreamingSpec(LitSpec):
    """The smallest possible spec."""

    def __init__(self):
        super().__init__()
        self.api_path = "/x"

    @property
    def stream(self):
        return True

    def decode_request(self, request, context_kwargs=None):
        return request

    def encode_response(self, output, context_kwargs=None):
        return output


class Api(litserve.LitAPI):
    def setup(self, device):
        pass


@pytest.fixture
def server():
    return litserve.LitServer(Api(spec=StreamingSpec()), accelerator="cpu", workers_per_device=1, timeout=False)


def test_the_pinned_version_is_installed():
    assert litserve.__version__ == "0.2.19"


def test_a_spec_has_the_attributes_that_the_http_process_reads():
    spec = StreamingSpec()
    for name in ("response_buffer", "request_queue", "response_queue_id"):
        assert getattr(spec, name) is None
    assert list(inspect.signature(spec.add_endpoint).parameters) == ["path", "endpoint", "methods"]
    assert inspect.signature(litserve.LitAPI.decode_request).parameters["request"]


def test_the_server_has_the_attributes_that_we_set(server):
    assert server.uvicorn_graceful_timeout == 30
    assert server._monitor_workers is True
    assert callable(server._init_manager)
    assert callable(server._start_server)
    assert "in enumerate(self.inference_workers)" in inspect.getsource(server._perform_graceful_shutdown)
    assert list(inspect.signature(server.launch_inference_worker).parameters) == ["lit_api"]
    assert not inspect.signature(server.verify_worker_status).parameters
    assert server.litapi_request_queues == {}
    assert [api.api_path for api in server.litapi_connector] == ["/x"]
    assert server.response_buffer == {}
    assert {"/", "/health", "/info"} <= {getattr(route, "path", None) for route in server.app.router.routes}
    assert callable(server.app.router.lifespan_context)
    parameters = inspect.signature(server.run).parameters
    assert {"host", "port", "num_api_servers", "log_level", "generate_client_file"} <= parameters.keys()


def test_an_api_s_authorize_guards_the_spec_s_routes():
    def refuse():
        raise NotImplementedError

    api = Api(spec=StreamingSpec())
    api.authorize = refuse
    assert litserve.LitServer(api, accelerator="cpu", timeout=False).setup_auth(api) is refuse
