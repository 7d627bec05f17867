"""A ROS 2 node around a policy. Only ``node`` and ``topics`` import rclpy."""
