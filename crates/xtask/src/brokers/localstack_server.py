"""LocalStack's gateway with SQS and SNS alone, on the loopback interface: localstack_server.py PORT."""

import os
import sys

PORT = int(sys.argv[1])

# Read when LocalStack is imported. Queue URLs carry GATEWAY_LISTEN; SNS without moto is the provider `v2`; nothing is
# reported to anybody, and no queue writes metrics to a CloudWatch that does not run.
os.environ.update(
    GATEWAY_LISTEN=f"127.0.0.1:{PORT}",
    SERVICES="sqs,sns",
    PROVIDER_OVERRIDE_SNS="v2",
    SQS_DISABLE_CLOUDWATCH_METRICS="1",
    DISABLE_EVENTS="1",
    SKIP_SSL_CERT_DOWNLOAD="1",
    LS_LOG="error",
)

from localstack.aws import spec
from localstack.aws.app import LocalstackAwsGateway
from localstack.logging.setup import setup_logging_from_config
from localstack.services.plugins import SERVICE_PLUGINS
from rolo.serving.twisted import TwistedGateway
from twisted.internet import endpoints, reactor

# The descriptions of all services of Amazon take half a minute to read.
spec.list_services = lambda: [spec.load_service(name) for name in ("sqs", "sqs-query", "sns")]

setup_logging_from_config()
gateway = LocalstackAwsGateway(SERVICE_PLUGINS)
for service in ("sqs", "sns"):
    SERVICE_PLUGINS.require(service)

# A long poll takes a thread.
reactor.suggestThreadPoolSize(1000)
# LocalStack's own server leaves the interface out.
endpoints.TCP4ServerEndpoint(reactor, PORT, interface="127.0.0.1").listen(TwistedGateway(gateway))
reactor.run()
