//! Streams of numbered frames over a connection, both ways at once, from which no byte can be
//! missing, doubled or in another place unseen. Both sides of a test use this.
//!
//! A frame has [`FRAME`] bytes: its number, and what follows of a [`Pattern`]. The last one is marked
//! in its number, and then the stream ends. The side that has connected sends the number of the
//! connection first, from which the patterns follow.

use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::pattern::Pattern;

/// Bytes of a frame.
pub const FRAME: usize = 1024;
/// Marks the number of the last frame.
const LAST: u64 = 1 << 63;

/// A connected socket.
pub trait Socket: Read + Write + Send + Sized + 'static {
    /// Another handle for it.
    ///
    /// # Errors
    /// There is no descriptor left.
    fn another(&self) -> io::Result<Self>;
    /// Ends what is sent.
    ///
    /// # Errors
    /// It is not connected any more.
    fn end_sending(&self) -> io::Result<()>;
}

impl Socket for UnixStream {
    fn another(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Socket for TcpStream {
    fn another(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// What a side does with its streams.
#[derive(Debug, Clone, Default)]
pub struct Control {
    /// Frames that have come and were right, of all streams.
    pub frames: Arc<AtomicU64>,
    /// No more is sent.
    pub stop: Arc<AtomicBool>,
}

impl Control {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Begins a connection with this number, and exchanges frames until the control says stop, or
/// `most` have been sent. Returns the number of those that came.
///
/// # Errors
/// The connection breaks, or something came that was not sent.
pub fn begin<S: Socket>(
    mut socket: S,
    number: u64,
    most: u64,
    control: &Control,
) -> io::Result<u64> {
    socket.write_all(&number.to_le_bytes())?;
    exchange(socket, [2 * number, 2 * number + 1], most, control)
        .map_err(|e| io::Error::new(e.kind(), format!("connection {number}: {e}")))
}

/// Takes part in a connection that the other side has begun, until that side ends it. A connection
/// that ends before it has a number was given up by the other side, and none of this one's concern.
///
/// # Errors
/// As for [`begin`].
pub fn accept<S: Socket>(mut socket: S, control: &Control) -> io::Result<u64> {
    let mut number = [0; 8];
    match socket.read(&mut number[..1]) {
        Ok(0) => return Ok(0),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
        begun => begun?,
    };
    socket.read_exact(&mut number[1..])?;
    let number = u64::from_le_bytes(number);
    let own = Control {
        stop: Arc::default(),
        ..control.clone()
    };
    exchange(socket, [2 * number + 1, 2 * number], LAST, &own)
        .map_err(|e| io::Error::new(e.kind(), format!("connection {number}: {e}")))
}

/// Sends the first of two patterns and receives the second. Ends sending when nothing comes any more.
fn exchange<S: Socket>(
    socket: S,
    [out, back]: [u64; 2],
    most: u64,
    control: &Control,
) -> io::Result<u64> {
    let ended = Arc::new(AtomicBool::new(false));
    let sender = {
        let (socket, control, ended) = (socket.another()?, control.clone(), Arc::clone(&ended));
        thread::spawn(move || {
            let over = |sent| sent >= most || control.stopped() || ended.load(Ordering::Relaxed);
            send(socket, out, over)
        })
    };
    let received = receive(socket, back, &control.frames);
    ended.store(true, Ordering::Relaxed);
    let sent = sender
        .join()
        .map_err(|_| io::Error::other("a thread died"))?;
    let received = received?;
    sent?;
    Ok(received)
}

fn send<S: Socket>(mut socket: S, seed: u64, over: impl Fn(u64) -> bool) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    for number in 0.. {
        let last = over(number);
        let mark = if last { number | LAST } else { number };
        let mut frame = mark.to_le_bytes().to_vec();
        frame.extend(pattern.take(FRAME - frame.len()));
        socket
            .write_all(&frame)
            .map_err(|e| io::Error::new(e.kind(), format!("sending frame {number}: {e}")))?;
        if last {
            break;
        }
    }
    socket.end_sending()
}

fn receive(socket: impl Read, seed: u64, frames: &AtomicU64) -> io::Result<u64> {
    let mut reader = BufReader::with_capacity(16 * FRAME, socket);
    let mut pattern = Pattern::new(seed);
    let mut frame = [0; FRAME];
    for number in 0.. {
        let at = |e: io::Error| io::Error::new(e.kind(), format!("frame {number}: {e}"));
        reader.read_exact(&mut frame).map_err(at)?;
        let (mark, bytes) = frame.split_at(8);
        let mark = mark
            .iter()
            .rev()
            .fold(0, |mark, &b| mark << 8 | u64::from(b));
        if mark & !LAST != number || !pattern.continues_with(bytes) {
            return Err(io::Error::other(format!(
                "what came as frame {number} is not what was sent"
            )));
        }
        frames.fetch_add(1, Ordering::Relaxed);
        if mark & LAST != 0 {
            return match reader.read(&mut frame).map_err(at)? {
                0 => Ok(number + 1),
                _ => Err(io::Error::other("something came after the last frame")),
            };
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a side that sends these bytes makes of the other side's result.
    fn told(bytes: &[u8]) -> io::Result<u64> {
        receive(bytes, 9, &AtomicU64::new(0))
    }

    #[test]
    fn both_sides_agree() {
        let (one, other) = UnixStream::pair().unwrap();
        let side = thread::spawn(|| accept(other, &Control::default()));
        let control = Control::default();
        assert!(begin(one, 3, 500, &control).unwrap() > 0);
        assert_eq!(side.join().unwrap().unwrap(), 501);
        assert!(control.frames.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn lost_doubled_and_late_bytes_are_found() {
        let (one, mut other) = UnixStream::pair().unwrap();
        send(one, 9, |sent| sent == 4).unwrap();
        let mut whole = Vec::new();
        other.read_to_end(&mut whole).unwrap();
        assert_eq!(told(&whole).unwrap(), 5);
        let cut = |from: usize, to: usize| [&whole[..from], &whole[to..]].concat();
        assert!(told(&cut(700, 701)).is_err());
        assert!(told(&cut(FRAME, 2 * FRAME)).is_err());
        assert!(told(&cut(3 * FRAME, 2 * FRAME)).is_err());
        assert!(told(&whole[..4 * FRAME]).is_err());
        assert!(told(&[&whole[..], &[0]].concat()).is_err());
    }
}
