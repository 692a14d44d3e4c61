"""grpcio's own health and reflection clients."""
import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from common import GRPC

channel = grpc.insecure_channel(GRPC)
health = health_pb2_grpc.HealthStub(channel)
for service in ("", "inference.GRPCInferenceService"):
    answer = health.Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING, answer
watched = health.Watch(health_pb2.HealthCheckRequest(service=""))
assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
watched.cancel()
try:
    health.Check(health_pb2.HealthCheckRequest(service="nothing"))
    raise AssertionError("an unknown service is healthy")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.NOT_FOUND, error

database = ProtoReflectionDescriptorDatabase(channel)
assert "inference.GRPCInferenceService" in database.get_services()
service = DescriptorPool(database).FindServiceByName("inference.GRPCInferenceService")
assert "ModelInfer" in service.methods_by_name
print("grpcio: health and reflection answer")
