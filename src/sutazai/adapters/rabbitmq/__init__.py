"""RabbitMQ: queues of tasks and the stream of events, over aio-pika."""
