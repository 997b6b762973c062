// SPDX-License-Identifier: Apache-2.0
/*
 * The floor: the least that an enforcer in user space costs. Serve the queue of each network namespace and accept what
 * the rules queue: SYNs as they are, any other packet with a mark that releases its flow into the kernel.
 *
 * accept_all QUEUE_NUMBER RELEASE_MARK NETNS_PATH...
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/socket.h>
#include <linux/netfilter.h>
#include <libnetfilter_queue/libnetfilter_queue.h>

#define MAX_QUEUES 16
#define TCP_FLAGS 13
#define TCP_SYN 0x02

static uint32_t release_mark;

static int has_syn(const unsigned char *packet, int length)
{
	int header = packet[0] >> 4 == 4 ? (packet[0] & 0x0f) * 4 : 40;

	return length > header + TCP_FLAGS && packet[header + TCP_FLAGS] & TCP_SYN;
}

static int answer(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *data, void *unused)
{
	uint32_t id = ntohl(nfq_get_msg_packet_hdr(data)->packet_id);
	unsigned char *packet;
	int length = nfq_get_payload(data, &packet);

	(void)message, (void)unused;
	if (length < 1)
		return nfq_set_verdict(queue, id, NF_DROP, 0, NULL);
	if (has_syn(packet, length))
		return nfq_set_verdict(queue, id, NF_ACCEPT, 0, NULL);
	return nfq_set_verdict2(queue, id, NF_REPEAT, release_mark, 0, NULL);
}

static struct nfq_handle *open_queue(const char *path, uint16_t number)
{
	int netns = open(path, O_RDONLY | O_CLOEXEC);
	struct nfq_handle *handle;
	struct nfq_q_handle *queue;

	if (netns < 0 || setns(netns, CLONE_NEWNET) < 0)
		err(1, "%s", path);
	close(netns);
	handle = nfq_open();
	if (handle == NULL)
		err(1, "nfq_open");
	queue = nfq_create_queue(handle, number, answer, NULL);
	if (queue == NULL || nfq_set_mode(queue, NFQNL_COPY_PACKET, 0xffff) < 0)
		err(1, "queue %u", number);
	return handle;
}

int main(int argc, char **argv)
{
	static char buffer[70000] __attribute__((aligned));
	struct nfq_handle *handles[MAX_QUEUES];
	struct pollfd waiting[MAX_QUEUES];
	int count = argc - 3;

	if (count < 1 || count > MAX_QUEUES)
		errx(2, "usage: accept_all QUEUE_NUMBER RELEASE_MARK NETNS_PATH...");
	release_mark = strtoul(argv[2], NULL, 0);
	for (int i = 0; i < count; i++) {
		handles[i] = open_queue(argv[i + 3], atoi(argv[1]));
		waiting[i] = (struct pollfd){.fd = nfq_fd(handles[i]), .events = POLLIN};
	}
	for (;;) {
		if (poll(waiting, count, -1) < 0)
			err(1, "poll");
		for (int i = 0; i < count; i++) {
			ssize_t length = waiting[i].revents ? recv(waiting[i].fd, buffer, sizeof buffer, MSG_DONTWAIT) : 0;

			if (length > 0)
				nfq_handle_packet(handles[i], buffer, length);
		}
	}
}
