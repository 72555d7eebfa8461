//! The other end of the network card: it sinks frames, makes them, sends them back, or has a network stack.

use crate::net;
use io_guest::{
    Case, ECHO_PORT, FRAME_HEADER, FRAME_WORDS, MAX_DATAGRAM, MAX_FRAME, Operation, RESPONDER_IP, RESPONDER_MAC, word,
};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::udp::{PacketBuffer, PacketMetadata, Socket};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address};
use std::collections::VecDeque;

/// How many frames wait for the guest at most; more are dropped.
const WAITING: usize = 64;

/// The responder.
pub struct Responder {
    /// The longest frame of a case, but for its stamp.
    expected: Vec<u8>,
    case: Option<Case>,
    taken: u32,
    given: u32,
    wrong: u32,
    waiting: VecDeque<Vec<u8>>,
    stack: Stack,
}

impl Responder {
    /// A responder for guests with this nonce.
    pub fn new(nonce: u64) -> Self {
        let mut expected = FRAME_HEADER.to_vec();
        expected.resize(FRAME_WORDS, 0);
        expected.extend((0..MAX_FRAME / 8).flat_map(|index| word(nonce, index).to_le_bytes()));
        expected.truncate(MAX_FRAME);
        let (case, waiting) = (None, VecDeque::new());
        Self { expected, case, taken: 0, given: 0, wrong: 0, waiting, stack: Stack::new() }
    }

    /// Does what `case` says from now on.
    pub fn begin(&mut self, case: Case) {
        self.case = Some(case);
        (self.taken, self.given, self.wrong) = (0, 0, 0);
        self.waiting.clear();
    }

    /// Whether every frame of the guest's that the case has was taken, and was as it should be.
    pub fn is_satisfied(&self) -> bool {
        match self.case {
            Some(Case { operation: Operation::Send | Operation::Echo, count, .. }) => {
                (self.taken, self.wrong) == (count, 0)
            }
            Some(Case { operation: Operation::Receive, count, .. }) => self.given == count,
            _ => true,
        }
    }

    /// The frame `index` of a case.
    fn frame(&mut self, case: &Case, index: u32) -> &[u8] {
        let stamp = case.stamp(index as usize).to_le_bytes();
        self.expected[FRAME_WORDS..FRAME_WORDS + stamp.len()].copy_from_slice(&stamp);
        &self.expected[..case.size as usize]
    }
}

impl net::Responder for Responder {
    fn take(&mut self, frame: &[u8]) {
        match self.case {
            Some(case @ Case { operation: Operation::Send | Operation::Echo, .. }) => {
                let as_should_be = self.frame(&case, self.taken) == frame;
                self.wrong += u32::from(!as_should_be);
                self.taken += 1;
                if case.operation == Operation::Echo && self.waiting.len() < WAITING {
                    self.waiting.push_back(frame.to_vec());
                }
            }
            Some(Case { operation: Operation::Exchange, .. }) => self.stack.take(frame),
            _ => {}
        }
    }

    fn give(&mut self, frame: &mut Vec<u8>) -> bool {
        let next = match self.case {
            Some(case @ Case { operation: Operation::Receive, .. }) if self.given < case.count => {
                self.given += 1;
                frame.clear();
                frame.extend_from_slice(self.frame(&case, self.given - 1));
                return true;
            }
            Some(Case { operation: Operation::Echo, .. }) => self.waiting.pop_front(),
            Some(Case { operation: Operation::Exchange, .. }) => self.stack.wire.to_guest.pop_front(),
            _ => None,
        };
        next.map(|next| *frame = next).is_some()
    }
}

/// A network stack that echoes datagrams.
struct Stack {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    echo: SocketHandle,
    begin: std::time::Instant,
}

impl Stack {
    fn new() -> Self {
        let mut wire = Wire::default();
        let config = Config::new(EthernetAddress(RESPONDER_MAC).into());
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        let [a, b, c, d] = RESPONDER_IP;
        let address = IpCidr::new(IpAddress::Ipv4(Ipv4Address::new(a, b, c, d)), 24);
        // The list has room for more than one.
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(address);
        });
        let buffer = || PacketBuffer::new(vec![PacketMetadata::EMPTY; 4], vec![0; 4 * MAX_DATAGRAM]);
        let mut socket = Socket::new(buffer(), buffer());
        // Only a port of 0 cannot be bound.
        let _ = socket.bind(ECHO_PORT);
        let mut sockets = SocketSet::new(Vec::new());
        let echo = sockets.add(socket);
        Self { wire, interface, sockets, echo, begin: std::time::Instant::now() }
    }

    fn take(&mut self, frame: &[u8]) {
        self.wire.from_guest = Some(frame.to_vec());
        let now = Instant::from_micros(self.begin.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        let socket = self.sockets.get_mut::<Socket<'_>>(self.echo);
        while let Ok((datagram, from)) = socket.recv() {
            let datagram = datagram.to_vec();
            // What there is no room for is lost, as datagrams are.
            let _ = socket.send_slice(&datagram, from);
        }
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }
}

/// What the stack takes for its network card.
#[derive(Default)]
struct Wire {
    from_guest: Option<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Room<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Received, Room<'_>)> {
        (self.to_guest.len() < WAITING).then_some(())?;
        Some((Received(self.from_guest.take()?), Room(&mut self.to_guest)))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Room<'_>> {
        (self.to_guest.len() < WAITING).then_some(Room(&mut self.to_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MAX_FRAME;
        capabilities
    }
}
